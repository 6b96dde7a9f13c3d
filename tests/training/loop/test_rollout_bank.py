"""A bank of rollouts: what is in it, that it is made once, and that runs with one resume to the same numbers."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from pdmd_core.roles import Roles
from pdmd_core.rollout import before_step
from pdmd_core.velocities import expert_velocities, guided_velocity
from tests.helpers.configs import changed
from training.config.schema import ConfigError, DistillConfig
from training.loop import rollout_bank as module
from training.loop.build import build_run
from training.loop.dry_run import describe
from training.loop.resumption import Resume
from training.loop.rollout_bank import open_bank
from training.loop.trainer import Trainer


@pytest.fixture
def banked(config: DistillConfig, monkeypatch: pytest.MonkeyPatch) -> DistillConfig:
    """Ten samples in files of four."""
    monkeypatch.setattr(module, "CHUNK", 4)
    return changed(
        config, **{"rollouts.bank": 10, "updates": 2, "checkpoints.keep": 9, "validation.teacher_steps": None}
    )


def rows(config: DistillConfig) -> list[dict[str, Any]]:
    text = (config.output_dir / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) | {"time": None} for line in text.splitlines()]


def test_updates_begin_with_it_and_a_resumed_run_has_the_same_numbers(
    banked: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    velocity = Roles.velocity

    def seen(self: Roles, role: str, *arguments: Any) -> Tensor:
        asked.append(role)
        return velocity(self, role, *arguments)

    monkeypatch.setattr(Roles, "velocity", seen)
    trainer = Trainer(build_run(banked))
    updated = trainer.update
    by_earlier: list[int] = []

    def update() -> Any:
        asked.clear()
        found = updated()
        by_earlier.append(asked.count("high_noise"))
        return found

    monkeypatch.setattr(trainer, "update", update)
    trainer.run()
    assert min(by_earlier[:2]) > 0 and by_earlier[2:] == [0, 0], "no update of the second phase runs the first expert"
    resumed = changed(banked, output_dir=str(tmp_path / "resumed"))
    for update_number in (1, 3):  # before the bank is made, and in the middle of its phase
        shutil.rmtree(resumed.output_dir, ignore_errors=True)
        kept = f"checkpoints/update-{update_number:08d}"
        shutil.copytree(banked.output_dir / kept, resumed.output_dir / kept)
        Trainer(build_run(resumed, Resume())).run()
        assert rows(resumed) == rows(banked)[update_number:]


def test_it_is_what_the_frozen_experts_make_and_is_made_once(
    banked: DistillConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(build_run(banked))
    trainer.run()
    run = trainer.built
    bank, order = open_bank(run, 1)
    assert len(bank.examples) == 10 and sorted(order.members[0].tolist()) == list(range(10))
    found, examples = bank.rows(torch.tensor([9, 2]), "cpu")
    assert torch.equal(examples, bank.examples[[9, 2]]) and set(bank.examples.tolist()) == {0, 1, 2}
    noise = torch.stack(
        [module._noise(banked.seed, 1, place, run.data.shapes[0], torch.device("cpu")) for place in (9, 2)]
    )
    with torch.no_grad():
        conditioning = run.data.prompts.conditioning(examples, torch.device("cpu"))
        expected = before_step(expert_velocities(run.roles, run.plan, conditioning), run.plan, 1, 0, noise)
    torch.testing.assert_close(found, expected)

    with mock.patch.object(module, "_make", side_effect=AssertionError("made again")):
        open_bank(run, 1)
    files = sorted(bank.folder.glob("*.safetensors"))
    assert len(files) == 3
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    made: list[list[int]] = []
    make = module._make
    with mock.patch.object(module, "_make", lambda *a: (made.append(a[2]), make(*a))[1]):
        again, _ = open_bank(run, 1)
    assert made == [[4, 5, 6, 7]], "the damaged file alone"
    assert "is damaged (not what was written): its samples are made again" in capsys.readouterr().err
    places = torch.arange(10)
    assert torch.equal(again.rows(places, "cpu")[0], bank.rows(places, "cpu")[0])

    parts: list[Tensor] = []

    def of_process(rank: int, gather: Any) -> Tensor:
        stand_in = SimpleNamespace(
            num_processes=2,
            process_index=rank,
            device=torch.device("cpu"),
            autocast=run.accelerator.autocast,
            gather=gather,
        )
        other = SimpleNamespace(**{name: getattr(run, name) for name in ("config", "roles", "plan", "data")})
        other.accelerator = stand_in
        shape, chosen = run.data.shapes[0], [0, 1, 2]
        return module._make(other, 1, chosen, bank.examples[chosen], shape)  # type: ignore[arg-type]

    def kept(value: Tensor) -> Tensor:
        parts.append(value)
        return torch.cat([value, value])

    of_process(0, kept), of_process(1, kept)
    together = of_process(0, lambda value: torch.cat(parts))
    torch.testing.assert_close(together, bank.rows(torch.tensor([0, 1, 2]), "cpu")[0])
    run.roles.parameters("high_noise")[0].data.add_(1)
    assert open_bank(run, 1)[0].folder != bank.folder, "other experts make other samples"


def test_where_experts_denoise_it_is_what_the_guided_teacher_samples_in_all_phases_the_same(
    banked: DistillConfig,
) -> None:
    objective = {"expert_loss": "denoising", "path_steps": 2, "guidance_scale": 3.0}
    denoising = changed(banked, objective=objective)
    trainer = Trainer(build_run(denoising))
    run, asked = trainer.built, Counter[str]()
    velocity = Roles.velocity

    def seen(self: Roles, role: str, *arguments: Any) -> Tensor:
        asked[role] += 1
        return velocity(self, role, *arguments)

    with mock.patch.object(Roles, "velocity", seen):
        trainer.run()
    steps, files = len(run.plan.sigmas) * 2, 3
    assert asked["teacher"] == steps * files, "the teacher samples once, whatever number of phases and updates"
    (bank, _), (other, _) = open_bank(run, 0), open_bank(run, 1)
    assert bank.folder == other.folder
    found, examples = bank.rows(torch.tensor([9, 2]), "cpu")
    cpu, maker = torch.device("cpu"), "teacher, guidance 3.0, 2 steps"
    x = torch.stack([module._noise(banked.seed, maker, place, run.data.shapes[0], cpu) for place in (9, 2)])
    sides = run.data.prompts.conditioning_pair(examples, cpu)
    with torch.no_grad():
        for sigma, after in pairwise([*run.plan.sigmas, 0.0]):
            for a, b in pairwise([sigma, (sigma + after) / 2, after]):
                x = x + (b - a) * guided_velocity(run.roles, x, a, *sides, 3.0)
    torch.testing.assert_close(found, x)
    for changes in ({"objective.guidance_scale": 2.0}, {"objective.path_steps": 1}):
        again = build_run(changed(denoising, **changes))
        assert open_bank(again, 0)[0].folder != bank.folder, "another teacher's samples"
    text = describe(denoising)
    of_teacher = "rollouts.bank: 10 samples of the teacher, {} evaluations each, for all phases; the teacher's"
    assert text.count(of_teacher.format(steps)) == 1
    assert text.count("2 updates, 1 network evaluations of each sample (generator 1)") == 2
    alone = changed(denoising, plan={"steps": [4], "shift": 3.0})
    assert of_teacher.format(8) in describe(alone), "also in a plan of one phase"


def test_the_dry_run_counts_it_and_one_phase_has_none(banked: DistillConfig) -> None:
    text = describe(banked)
    counts = re.findall(r"phase \w+: 2 updates, ([\d.]+) network evaluations of each sample \(rollout ([\d.]+)", text)
    assert len(counts) == 2 and counts[0] == counts[1], "as if there were no phase before"
    assert "rollouts.bank: 10 samples of 2 evaluations each before its first update" in text
    with pytest.raises(ConfigError, match=r"rollouts\.bank: is made by experts of earlier phases, this plan has one"):
        changed(banked, plan={"steps": [2], "shift": 3.0})
