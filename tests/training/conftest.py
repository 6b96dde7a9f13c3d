"""A tiny teacher on disk and a configuration that distils it in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny import save_wan_pipeline
from training.config.schema import DistillConfig, parse_config


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wan_pipeline(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def settings_of_run(teacher: Path, tmp_path: Path) -> dict[str, Any]:
    """The configuration as plain data; tests change what they are about."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# three prompts\na panda\n\na fox\nan apple\n", encoding="utf-8")
    role = {"kind": "lora", "rank": 4, "alpha": 4, "lr": 1e-2}
    return {
        "model": {"path": str(teacher), "height": 16, "width": 16, "frames": 1, "max_sequence_length": 12},
        "data": {"prompts": str(prompts)},
        "plan": {"steps": [2, 2], "shift": 3.0},
        "objective": {"guidance_scale": 2.0},
        "generator": role,
        "fake": role,
        "updates": 3,
        "batch_size": 4,
        "fake_updates": 2,
        "ema_decay": 0.9,
        "lr_decay_share": 0.5,
        "output_dir": str(tmp_path / "run"),
        "checkpoints": {"every": 1, "keep": 2},
        "validation": {"every": None, "seeds": 2, "teacher_steps": 2},
        "monitoring": {"tracker": None, "log_every": 1},
    }


@pytest.fixture
def config(settings_of_run: dict[str, Any]) -> DistillConfig:
    return parse_config(settings_of_run, "test")
