"""Conditioning encoded by a command of its own, found by the run that follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from diffusers import WanTransformer3DModel

from tests.helpers.families.parts import picture
from tests.helpers.families.wan import wan_image_clip
from training import distill
from training.config.schema import load_config
from training.loop.build import build_run
from training.loop.trainer import Trainer


def loaded_where_it_is_not_needed(*arguments: object) -> None:
    raise AssertionError(f"loaded: {arguments}")


@pytest.mark.parametrize("images", [False, True])
def test_a_run_after_it_loads_no_encoder_and_it_loads_no_network(
    settings_of_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], images: bool
) -> None:
    if images:
        wan_image_clip().save_pretrained(tmp_path / "images")
        settings_of_run["model"] |= {"path": str(tmp_path / "images"), "width": 32, "frames": 5}
        lines = []
        for i, prompt in enumerate(("a panda", "a fox on red ice")):
            picture(i, (64, 48)).save(tmp_path / f"{i}.png")
            lines.append(json.dumps({"prompt": prompt, "image": f"{i}.png"}))
        settings_of_run["data"]["prompts"] = str(tmp_path / "prompts.jsonl")
        (tmp_path / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings_of_run), encoding="utf-8")
    with mock.patch.object(WanTransformer3DModel, "from_pretrained", loaded_where_it_is_not_needed):
        assert distill.main(["--config", str(config), "--encode_prompts"]) == 0
    assert f"{2 if images else 3} examples are encoded in " in capsys.readouterr().out
    with mock.patch("training.data.encoder.load_text_side", loaded_where_it_is_not_needed):
        trainer = Trainer(build_run(load_config(config)))
        trainer.output_dir.mkdir(parents=True, exist_ok=True)
        trainer.start_phase()
        assert trainer.update().values["fake_loss"] > 0
