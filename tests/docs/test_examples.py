"""The examples run as they are written; the notebook in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from docs.site.notebook import cells_of, code_of, text
from pdmd_core import PhasedExperts, PhasePlan
from pdmd_core.experts.verify import verify

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "examples" / "mixture.ipynb"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like the root of the repository; what examples write stays in it."""
    (tmp_path / "training").symlink_to(ROOT / "training")
    return tmp_path


def python(*arguments: str, cwd: Path) -> str:
    """Run a program that finds the packages of the repository; returns what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_three_lines_paint_a_picture(clone: Path) -> None:
    python(str(ROOT / "docs" / "examples" / "diffusers_three_lines.py"), cwd=clone)
    assert (clone / "panda.png").stat().st_size > 500


def test_the_tiny_teacher_is_distilled_into_experts_that_fit_it(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = str(ROOT / "docs" / "examples" / "distil_tiny_teacher.py")
    said = python(script, "--updates", "2", "--output", "runs/experts", cwd=clone)
    assert "high_noise" in said and "low_noise" in said
    monkeypatch.chdir(clone)
    experts = Path("runs/experts")
    assert all(check.passed for check in verify(experts, None, None)) and (experts / "panda.png").exists()
    for name in ("high_noise", "low_noise"):
        up = [w for key, w in PhasedExperts.open(experts).lora_state(name).items() if "lora_B" in key]
        assert up and all(bool(weight.any()) for weight in up), f"{name} was not trained"


def test_the_notebook_shows_what_its_text_says() -> None:
    """With fewer updates than the stored outputs were made with."""
    short = code_of(NOTEBOOK).replace("UPDATES, RATE = 700", "UPDATES, RATE = 350")
    assert short != code_of(NOTEBOOK)
    report = "import json\nprint(json.dumps([errors, boundary_distance, distances]))"
    lines = python("-c", f"{short}\n{report}", cwd=NOTEBOOK.parent).splitlines()
    errors, boundary, distances = json.loads(lines[-1])
    assert sum(errors["unbiased"]) < sum(errors["biased"]) / 3
    assert boundary["2 x 2"] < boundary["2 x 2, biased"] / 2
    assert distances["2 x 2"] < distances["one step"] / 1.5
    assert distances["teacher, 40 steps"] < 0.001 < 0.005 < distances["teacher, 4 steps"]


def test_the_notebook_was_run_as_a_whole() -> None:
    cells = [cell for cell in cells_of(NOTEBOOK) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    printed = "".join(text(output["text"]) for output in outputs if output["output_type"] == "stream")
    assert PhasePlan.from_steps([2, 2]).describe() in printed
