"""The walk on the architecture page is the one that a run takes."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import pdmd_core.distillation
from pdmd_core.objectives import fake_score_loss
from tests.helpers.tiny import save_wan_pipeline
from training import distill

ROOT = Path(__file__).parents[2]
STOP = re.compile(r"^\d\. `([\w.]+)`(?: in `([\w/.]+)`| there)", re.MULTILINE)


def test_the_walk_from_distill_to_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("a panda\n", encoding="utf-8")
    config = tmp_path / "config.yaml"
    settings = {
        "model": {"path": str(save_wan_pipeline(tmp_path / "teacher")), "height": 16, "width": 16},
        "data": {"prompts": str(tmp_path / "prompts.txt")},
        "plan": {"steps": [1]},
        "updates": 1,
        "batch_size": 1,
        "fake_updates": 1,
        "output_dir": str(tmp_path / "run"),
        "monitoring": {"tracker": None},
    }
    config.write_text(json.dumps(settings), encoding="utf-8")
    walked: list[tuple[str, str]] = []

    def noted(*arguments: Any) -> torch.Tensor:
        for frame in inspect.stack()[1:]:
            path = Path(frame.filename)
            if ROOT in path.parents and path.parent.name != "end_to_end":
                walked.insert(0, (frame.frame.f_code.co_qualname, path.relative_to(ROOT).as_posix()))
        return fake_score_loss(*arguments)

    monkeypatch.setattr(pdmd_core.distillation, "fake_score_loss", noted)
    assert distill.main(["--config", str(config)]) == 0
    names = [name for name, _ in walked]
    taken = [*walked[names.index("distill") :], ("fake_score_loss", "pdmd_core/objectives.py")]
    told: list[tuple[str, str]] = []
    for name, path in STOP.findall((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")):
        told.append((name, path or told[-1][1]))
    assert taken == told
    assert len(told) <= 8
