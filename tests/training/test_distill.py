"""Arguments of distill.py: what they say is done, what nothing would come of is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from training import distill
from training.config.schema import parse_config, with_overrides


@pytest.fixture
def config_file(settings_of_run: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings_of_run), encoding="utf-8")
    return path


@pytest.mark.parametrize("folder", ["runs/x #1", "2024-01-01", "null", "1e3", "{a: b}", "run: 2"])
def test_the_output_folder_is_a_path_and_no_yaml(
    folder: str, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill.main(["--config", str(config_file), "--dry-run", "--output_dir", folder]) == 0
    assert f"writes {folder}/" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("output_dir=runs/x #1", Path("runs/x #1")),
        ("output_dir=2024-01-01", Path("2024-01-01")),
        ("data.negative_prompt=blurry: #1, no hands", "blurry: #1, no hands"),
        ("data.negative_prompt=", ""),
        ("data.negative_prompt=no", "no"),
        ("data.negative_prompt='a: b'", "a: b"),
        ("data.prompt_column=1", "1"),
        ("data.cache_dir=null", None),
        ("data.cache_dir=", None),
        ("data.cache_dir=1e3", Path("1e3")),
        ("model.revision=1234567", "1234567"),
        ("precision=no", "no"),
        ("updates=3", 3),
        ("validation.prompts=[a, b]", ["a", "b"]),
        ("generator.targets=null", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_text_of_an_override_is_what_it_says(override: str, value: Any, settings_of_run: dict[str, Any]) -> None:
    found: Any = parse_config(with_overrides(settings_of_run, [override]), "here")
    for name in override.partition("=")[0].split("."):
        found = getattr(found, name)
    assert found == value and isinstance(found, Path if isinstance(value, Path) else type(value))


def test_keys_that_nothing_comes_of_are_refused(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for overrides, says in (
        (["plan.steps=null", "plan.sigmas=[[1.0], [0.5]]", "plan.shift=3"], "shift is for steps"),
        (["validation.prompts=[]"], "validation.prompts"),
    ):
        assert distill.main(["--config", str(config_file), "--dry-run", *overrides]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    assert distill.main(["--config", str(config_file.parent)]) == 2
    assert "not a file that can be read" in capsys.readouterr().err


def test_overrides_count_in_their_order(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for first, last in (("--seed=7", "seed=-1"), ("seed=7", "--seed=-1")):
        assert distill.main(["--config", str(config_file), first, "--dry-run", last]) == 2
        assert "seed" in capsys.readouterr().err, "the last one counts, and it cannot be"
        assert distill.main([last, "--config", str(config_file), "--dry-run", first]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dry-run"], "give --config"),
        (["--config", "c", "--dry-run", "--resume"], "--resume is for a run, --dry-run is not one"),
        (["--config", "c", "--encode_prompts", "--resume"], "--resume is for a run, --encode_prompts is not one"),
        (["--config", "c", "--dry-run", "--push_to_hub", "a/b"], "--push_to_hub is for a run, --dry-run is not one"),
        (["--config", "c", "--encode_prompts", "--push_to_hub", "a/b"], "--push_to_hub is for a run"),
        (["--config", "c", "--gpus", "2"], "--gpus is for --dry-run"),
        (["--config", "c", "--memory-per-gpu", "80"], "--memory-per-gpu is for --dry-run"),
        (["--config", "c", "--private"], "--private is for --push_to_hub"),
        (["--push_to_hub", "a/b", "--output_dir", "x", "--resume"], "--resume is for a run, which needs --config"),
        (["--push_to_hub", "a/b", "--output_dir", "x", "seed=1"], "seed=1 is for a run, which needs --config"),
        (["--config", "c", "--resum"], "unknown option --resum, did you mean --resume?"),
        (["--config", "c", "--dry_run"], "unknown option --dry_run, did you mean --dry-run?"),
        (["--config", "c", "--seed", "3"], "seed is a configuration key: write it as seed=value"),
        (["--config", "c", "again"], "unexpected argument 'again'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_nobody_listens_to_is_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("distill.py: ") and says in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config", ""], "--config: expected a path"),
        (["--config", "c", "--output_dir", ""], "--output_dir: expected a path"),
        (["--config", "c", "--output_dir", __file__], "is a file"),
        (["--config", "c", "--dry-run", "--gpus", "0"], "--gpus: expected a whole number of at least 1, found '0'"),
        (["--config", "c", "--dry-run", "--memory-per-gpu", "0"], "--memory-per-gpu: expected a number above 0"),
        (["--config", "c", "--dry-run", "--memory-per-gpu", "nan"], "found 'nan'"),
        (["--config", "c", "--dry-run", "--encode_prompts"], "not allowed with argument --dry-run"),
        (["--push_to_hub", "", "--output_dir", "x"], "--push_to_hub: expected some text"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_values_that_cannot_be_are_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        distill.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and line.startswith("distill.py: ") and says in line
