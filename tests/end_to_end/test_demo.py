"""What `make demo` does and promises, and the same report for the shipped experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from training import distill, evaluate

SEEDS = ["--seeds", "6"]
"""As `make demo` has them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def report(folder: Path) -> dict[str, dict[str, Any]]:
    rows = json.loads((folder / "report.json").read_text(encoding="utf-8"))["rows"]
    return {"many": rows[0], "few": rows[1], "experts": rows[2]}


@pytest.mark.slow
def test_the_demo_s_experts_are_at_least_twice_as_close_to_the_teacher_as_the_teacher_s_own_few_steps(
    folder: Path,
) -> None:
    """In half of its updates."""
    shorter = ["--output_dir", str(folder), "updates=20"]
    assert distill.main(["--config", "training/configs/embedded_demo.yaml", *shorter]) == 0
    assert evaluate.main(["--experts", str(folder / "experts"), "--output_dir", str(folder), *SEEDS]) == 0
    rows = report(folder)
    assert set(rows["experts"]) >= {"method", "network_evaluations", "frechet", "diversity", "agreement", "seconds"}
    assert [row["network_evaluations"] for row in rows.values()] == [80, 8, 4]
    assert rows["experts"]["frechet"] <= 0.5 * rows["few"]["frechet"]
    assert rows["experts"]["agreement"] >= 0.8
    with Image.open(folder / "report.png") as picture:
        assert picture.width > picture.height
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "report.png" in text
    assert all(row["method"] in text for row in rows.values())


@pytest.mark.slow
def test_the_shipped_experts_are_at_least_five_times_as_close(folder: Path, experts: Path) -> None:
    """With the class of its teacher, as `make demo` names it, the teacher's samples are those of the demo."""
    named = ["--experts", str(experts), "--pipeline", "WanPipeline"]
    assert evaluate.main([*named, "--output_dir", str(folder), *SEEDS]) == 0
    rows = report(folder)
    assert rows["experts"]["frechet"] <= 0.2 * rows["few"]["frechet"]
    assert rows["experts"]["diversity"] >= 0.85 * rows["many"]["diversity"]
