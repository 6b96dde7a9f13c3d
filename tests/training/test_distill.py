"""Arguments of distill.py: what they say is done, what nothing would come of is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from training import distill


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
