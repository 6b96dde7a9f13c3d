"""Arguments of the commands: what is taken, and the one line about what is not."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdmd_core import arguments


def refused(capsys: pytest.CaptureFixture[str], parser: argparse.ArgumentParser, *given: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(given)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    return line


@pytest.mark.parametrize(
    ("kind", "taken", "not_taken"),
    [
        (arguments.COUNT, {"1": 1, "64": 64}, {"0": "of at least 1", "-3": "", "1.5": "", "x": "", "": ""}),
        (arguments.SEED, {"0": 0, str(2**63 - 1): 2**63 - 1}, {"-1": "from 0 to 9223372036854775807", str(2**63): ""}),
        (arguments.number(0), {"0": 0.0, "1e-3": 1e-3}, {"-1": "of at least 0", "nan": "", "inf": "", "x": ""}),
        (arguments.number(0, above=True), {"3": 3.0}, {"0": "a number above 0", "-0.5": "", "nan": "", "inf": ""}),
        (arguments.text, {"a fox": "a fox"}, {"": "some text", " ": ""}),
        (arguments.path, {"a/b #1": Path("a/b #1")}, {"": "a path"}),
        (arguments.output_file(".png"), {"a/b.PNG": Path("a/b.PNG")}, {"a.jpg": "ends in .png", "v1.2": "", "a": ""}),
    ],
    ids=["count", "seed", "number", "positive", "text", "path", "file"],
)
def test_a_type_takes_its_values_and_says_what_it_expected(
    kind: Callable[[str], Any], taken: dict[str, Any], not_taken: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = arguments.CommandParser(prog="p")
    parser.add_argument("--it", type=kind)
    for given, value in taken.items():
        assert parser.parse_args([f"--it={given}"]).it == value
    for given, words in not_taken.items():
        line = refused(capsys, parser, f"--it={given}")
        assert line.startswith("p: --it: expected ") and words in line and f"found {given!r} (see p --help)" in line


def test_what_is_written_may_not_be_below_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    parser = arguments.CommandParser(prog="p")
    parser.add_argument("--folder", type=arguments.output_folder)
    parser.add_argument("--file", type=arguments.output_file(".png"))
    for folder in (tmp_path, tmp_path / "new" / "newer"):
        assert parser.parse_args(["--folder", str(folder)]).folder == folder
    for place in ("file", "file/below"):
        assert f"and {tmp_path / 'file'} is a file" in refused(capsys, parser, "--folder", str(tmp_path / place))
    assert "is a file" in refused(capsys, parser, "--file", str(tmp_path / "file" / "a.png"))
    (tmp_path / "a.png").mkdir()
    assert "a file name that ends in .png" in refused(capsys, parser, "--file", str(tmp_path / "a.png"))


def test_options_have_one_name_each_and_the_nearest_one_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    parser = arguments.CommandParser(prog="p")
    parser.add_argument("--seeds", type=int)
    assert "unknown option --seed, did you mean --seeds?" in refused(capsys, parser, "--seed", "3")
    assert "unknown option --sedes, did you mean --seeds?" in refused(capsys, parser, "--sedes=3")
    assert refused(capsys, parser, "--unlike") == "p: unknown option --unlike (see p --help)"
    assert "unexpected argument 'more'" in refused(capsys, parser, "more")
    lenient = arguments.CommandParser(takes_others=True)
    lenient.add_argument("--seeds", type=int)
    assert lenient.parse_known_args(["a=1", "--seeds", "3", "--b=2", "c=3"])[1] == ["a=1", "--b=2", "c=3"]
