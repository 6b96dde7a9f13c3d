"""The three programs as users call them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from training import distill, evaluate, sample
from training.config.keys import fields_of
from training.config.schema import DistillConfig

ROOT = Path(__file__).parents[3]


@pytest.fixture
def config_file(settings_of_run: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings_of_run), encoding="utf-8")
    return path


def failure(capsys: pytest.CaptureFixture[str], main: Any, *arguments: str) -> str:
    """Exit status 2 and one line on standard error."""
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("program", ["distill", "sample", "evaluate"])
def test_help_runs_from_any_folder(program: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "training" / f"{program}.py"), "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "usage: " in result.stdout
    if program == "distill":
        assert all(name in result.stdout for name, _, _ in fields_of(DistillConfig))


def test_dry_run_tells_plan_roles_memory_and_evaluations_and_writes_nothing(
    config_file: Path, settings_of_run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill.main(["--config", str(config_file), "--dry-run"]) == 0
    text = capsys.readouterr().out
    for words in (
        "high_noise",
        "low_noise",
        "fake",
        "teacher",
        "LoRA rank 4",
        "MiB",
        "network evaluations",
        "3 prompts",
    ):
        assert words in text
    assert not Path(settings_of_run["output_dir"]).exists()


def test_distil_then_sample(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill.main(["--config", str(config_file), "updates=1"]) == 0
    experts = tmp_path / "run" / "experts"
    assert str(experts) in capsys.readouterr().out
    output = tmp_path / "grid.png"
    arguments = ["--prompt", "a panda", "--prompt", "a fox", "--seeds", "1", "2", "3", "--output", str(output)]
    assert sample.main(["--experts", str(experts), *arguments]) == 0
    with Image.open(output) as image:
        assert image.size == (2 * (3 * 16 + 2 * 2), 2 * (2 * 16 + 2))
    before = output.read_bytes()
    assert sample.main(["--experts", str(experts), *arguments]) == 0
    assert output.read_bytes() == before


def test_clips_are_sampled_into_a_filmstrip_and_an_animation(teacher: Path, tmp_path: Path) -> None:
    output = tmp_path / "clip.png"
    arguments = ["--teacher", str(teacher), "--steps", "2", "--frames", "5", "--height", "16", "--width", "16"]
    assert sample.main([*arguments, "--prompt", "x", "--seeds", "0", "--output", str(output)]) == 0
    with Image.open(output.with_suffix(".gif")) as animation:
        assert animation.n_frames == 5
    assert output.exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        *(
            (f"{role}.lr={lr}", f"{role}.lr: expected a finite number above 0, found ")
            for role in ("generator", "fake")
            for lr in ("0", "-1e-4", ".inf", ".nan")
        ),
        *(
            (f"fake.betas={betas}", "fake.betas: expected a finite number at least 0 and below 1, found ")
            for betas in ("[1.0, 0.9]", "[0.0, -0.1]", "[0.0, .nan]")
        ),
        *((f"seed={seed}", "seed: Input should be ") for seed in ("-1", "9223372036854775808", "0.5", "x")),
        *((f"ema_decay={decay}", "ema_decay: Input should be ") for decay in ("0", "1", "-0.5", "1.5", ".nan", ".inf")),
        ("objective.guidance_scale=0.5", "objective.guidance_scale: expected a finite number at least 1, found 0.5"),
        ("generator.rank=0", "generator.rank: expected a whole number at least 1, found 0"),
        ("sample_every=3", "sample_every is validation.every now"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses_in_the_same_words(
    config_file: Path, settings_of_run: dict[str, Any], capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    arguments = ["--config", str(config_file), override]
    said = failure(capsys, distill.main, *arguments)
    assert words in said
    assert failure(capsys, distill.main, *arguments, "--dry-run") == said
    assert not Path(settings_of_run["output_dir"]).exists()


def test_user_mistakes_are_one_line(
    config_file: Path, tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*overrides: str) -> str:
        return failure(capsys, distill.main, "--config", str(config_file), *overrides)

    assert "did you mean 'batch_size'" in refused("batch_sise=3")
    assert "sample_every is validation.every now" in refused("--sample_every", "3")
    assert "no such prompt file" in refused("data.prompts=missing.txt")
    assert "neither a folder" in refused("model.path=nowhere")
    assert "no such config" in failure(capsys, distill.main, "--config", "missing.yaml")
    (tmp_path / "empty").mkdir()
    assert "phased_experts.json" in failure(capsys, sample.main, "--experts", str(tmp_path / "empty"), "--prompt", "x")
    assert "no such folder" in failure(capsys, sample.main, "--experts", str(tmp_path / "none"), "--prompt", "x")
    assert "give --prompt" in failure(capsys, sample.main, "--teacher", str(teacher))
    assert "give --experts or --teacher" in failure(capsys, sample.main, "--prompt", "x")
    wrong = ["--teacher", str(teacher), "--prompt", "x"]
    assert "frames, found 3" in failure(capsys, sample.main, *wrong, "--frames", "3")
    assert "at most 1000 steps" in failure(capsys, sample.main, *wrong, "--steps", "1001")
    arguments = ["--experts", str(tmp_path / "none"), "--output_dir", str(tmp_path / "out")]
    assert "no such folder" in failure(capsys, evaluate.main, *arguments)


def test_a_damaged_expert_file_is_one_line(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill.main(["--config", str(config_file), "updates=1"]) == 0
    capsys.readouterr()
    experts = tmp_path / "run" / "experts"
    file = experts / "low_noise.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "sha256" in failure(capsys, sample.main, "--experts", str(experts), "--prompt", "x")
    manifest = json.loads((experts / "phased_experts.json").read_text(encoding="utf-8"))
    manifest["experts"][0]["file"] = "../../secret.safetensors"
    (experts / "phased_experts.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert "plain file name" in failure(capsys, sample.main, "--experts", str(experts), "--prompt", "x")
