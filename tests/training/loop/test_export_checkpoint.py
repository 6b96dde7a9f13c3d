"""Experts of checkpoints and of phases that are done."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pdmd_core.experts import ExpertsError, PhasedExperts
from tests.helpers.configs import changed
from training import distill, sample
from training.config.schema import DistillConfig
from training.evaluation.distilled import open_experts, unfinished
from training.loop.build import build_run
from training.loop.trainer import Trainer


def equal(first: Path, second: Path) -> bool:
    one, other = load_file(first), load_file(second)
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_experts_of_any_checkpoint_are_those_of_the_run_and_say_what_they_lack(
    kind: str, config: DistillConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    role = config.model_dump(mode="json")["generator"] if kind == "lora" else {"kind": "full", "lr": 1e-3}
    plan = {"plan.steps": [1, 1], "checkpoints.keep_every": 1}
    config = changed(config, updates=2, batch_size=2, fake_updates=1, generator=role, **plan)
    run = config.output_dir
    Trainer(build_run(config)).run()
    capsys.readouterr()
    assert distill.main(["--output_dir", str(run), "--export"]) == 0
    assert capsys.readouterr().out == f"experts: {run / 'experts-update-00000004'}\n"
    for name in ("high_noise", "low_noise"):
        file = f"{name}.safetensors"
        assert equal(run / "experts-update-00000004" / file, run / "experts" / file), "averaged, as at the end"
    high = run / "experts-high_noise" / "high_noise.safetensors"
    assert equal(high, run / "experts" / "high_noise.safetensors"), "written when the phase was done"

    assert distill.main(["--output_dir", str(run), "--export", "1"]) == 0
    first = run / "experts-update-00000001"
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith(
        "the run of these experts is not finished, low_noise is missing: samples jump from sigma 1 "
    )
    assert not equal(first / "high_noise.safetensors", high)
    experts = PhasedExperts.open(first)
    assert [expert.name for expert in experts.manifest.experts] == ["high_noise"]
    assert experts.manifest.training["updates"] == [1]
    assert experts.manifest.training["unfinished"]["plan"] == config.plan.build().to_dict()
    picture = run / "samples.png"
    sampled = ["--experts", str(first), "--prompt", "a fox", "--seeds", "0", "--output", str(picture)]
    assert sample.main(sampled) == 0 and picture.stat().st_size > 0
    assert "note: the run of these experts is not finished, low_noise is missing" in capsys.readouterr().err
    assert unfinished(PhasedExperts.open(run / "experts").manifest) is None
    assert distill.main(["--output_dir", str(run), "--export", "9"]) == 2
    assert "no checkpoint of update 9; there are those of: 1, 2, 3, 4" in capsys.readouterr().err
    shutil.rmtree(run / "experts")
    with pytest.raises(
        ExpertsError, match=r"not finished: it has experts-high_noise, experts-update-00000001, .*--export"
    ):
        open_experts(run / "experts")
