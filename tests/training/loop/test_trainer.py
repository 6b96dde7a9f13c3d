"""The loop on a tiny real Wan pipeline: phases, resumption, faults, and what a run leaves behind."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from pdmd_core.experts import PhasedExperts
from pdmd_core.experts.format.fingerprint import fingerprint_of
from pdmd_core.experts.hub.card import card_text
from pdmd_core.roles import FAKE
from tests.helpers.configs import changed
from tests.helpers.interrupted import run_and_stop
from tests.helpers.tiny import transformer
from training.config.schema import ConfigError, DistillConfig
from training.loop import phase
from training.loop.build import build_run
from training.loop.checkpoints import list_checkpoints
from training.loop.resumption import Resume
from training.loop.trainer import Trainer, TrainingStopped


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) | {"time": None}
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_a_run_leaves_experts_metrics_samples_and_its_configuration(config: DistillConfig) -> None:
    folder = Trainer(build_run(config)).run()
    experts = PhasedExperts.open(folder)
    assert [expert.name for expert in experts.manifest.experts] == ["high_noise", "low_noise"]
    assert experts.manifest.plan == config.plan.build()
    assert experts.manifest.base.fingerprints == {"transformer": fingerprint_of(transformer())}
    for name in ("high_noise", "low_noise"):
        moved = [value.abs().max() for key, value in experts.lora_state(name).items() if key.endswith("lora_B")]
        assert min(moved) > 0, "every up-projection starts at zero and must have moved"
    rows = metrics(config.output_dir)
    assert [row["update"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {row["expert"] for row in rows[:3]} == {"high_noise"}
    assert {row["expert"] for row in rows[3:]} == {"low_noise"}
    assert (config.output_dir / "samples" / "low_noise-final.png").stat().st_size > 0
    assert (config.output_dir / "config.yaml").exists()
    assert (folder / "scheduler" / "scheduler_config.json").exists()
    assert (folder / "README.md").exists()


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 5])
def test_a_run_stopped_at_any_update_resumes_to_the_same_numbers(
    config: DistillConfig, tmp_path: Path, stop_after: int
) -> None:
    whole = Trainer(build_run(changed(config, output_dir=str(tmp_path / "whole"), **{"checkpoints.every": 2})))
    whole.run()
    broken = changed(config, output_dir=str(tmp_path / "broken"), **{"checkpoints.every": 2})
    run_and_stop(Trainer(build_run(broken)), stop_after)
    Trainer(build_run(broken, Resume())).run()
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "broken")
    for name in ("high_noise", "low_noise"):
        first, second = (load_file(tmp_path / run / "experts" / f"{name}.safetensors") for run in ("whole", "broken"))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_earlier_experts_and_the_base_do_not_move_in_a_later_phase(config: DistillConfig) -> None:
    trainer = Trainer(build_run(config))
    base = {name: value.clone() for name, value in trainer.roles.base_state_dict().items()}
    trainer.progress.phase = 1
    trainer.start_phase()
    before = {name: value.clone() for name, value in trainer.roles.state_dict("high_noise").items()}
    trainer.update()
    assert all(torch.equal(before[name], value) for name, value in trainer.roles.state_dict("high_noise").items())
    assert all(torch.equal(base[name], value) for name, value in trainer.roles.base_state_dict().items())
    assert any(
        value.abs().max() > 0 for name, value in trainer.roles.state_dict("low_noise").items() if "lora_B" in name
    )


def test_the_fake_starts_each_phase_as_the_teacher(config: DistillConfig) -> None:
    trainer = Trainer(build_run(config))
    trainer.start_phase()
    trainer.update()
    assert any(value.abs().max() > 0 for name, value in trainer.roles.state_dict(FAKE).items() if "lora_B" in name)
    trainer.progress.phase = 1
    trainer.start_phase()
    assert all(value.abs().max() == 0 for name, value in trainer.roles.state_dict(FAKE).items() if "lora_B" in name)


def resumed(config: DistillConfig, folder: Path) -> list[dict[str, Any]]:
    """The numbers of the same run in this folder, stopped after four updates and gone on with."""
    broken = changed(config, output_dir=str(folder))
    run_and_stop(Trainer(build_run(broken)), 4)
    Trainer(build_run(broken, Resume())).run()
    return metrics(folder)


def test_with_a_fake_for_each_step_a_stopped_run_resumes_to_the_same_numbers(
    config: DistillConfig, tmp_path: Path
) -> None:
    choices = {"fake_rollouts": "per_step", "score_draws": 2, "guidance_scale": 2.0}
    each = changed(config, objective=choices, output_dir=str(tmp_path / "whole"))
    trainer = Trainer(build_run(each))
    manifest = PhasedExperts.open(trainer.run()).manifest
    assert manifest.training["objective"] == {k: v for k, v in choices.items() if k != "guidance_scale"}
    moved = [value for fake in (FAKE, "fake_2") for value in trainer.roles.state_dict(fake).values()]
    assert all(value.abs().max() > 0 for value in moved)
    assert metrics(tmp_path / "whole") == resumed(each, tmp_path / "broken")


def test_regression_has_no_fake_and_a_stopped_run_resumes_to_the_same_numbers(
    config: DistillConfig, tmp_path: Path
) -> None:
    choices = {"expert_loss": "regression", "path_steps": 2, "fake_rollouts": "whole", "guidance_scale": 2.0}
    each = changed(config, objective=choices, output_dir=str(tmp_path / "whole"))
    trainer = Trainer(build_run(each))
    manifest = PhasedExperts.open(trainer.run()).manifest
    assert manifest.training["objective"] == {"expert_loss": "regression", "path_steps": 2}
    assert manifest.training["method"] == "regression" and not [key for key in manifest.training if "fake" in key]
    assert "distilled by regression, phase by phase, on the path of `" in card_text(manifest, "experts")
    assert set(trainer.roles.specs) == {"high_noise", "low_noise"}
    rows = metrics(tmp_path / "whole")
    assert all("generator_loss" in row and "fake_loss" not in row and "score_distance" not in row for row in rows)
    assert each.remarks()[0].startswith("not used with objective.expert_loss regression: objective.fake_rollouts")
    assert rows == resumed(each, tmp_path / "broken")


def test_denoising_has_no_fake_and_a_stopped_run_resumes_to_the_same_numbers(
    config: DistillConfig, tmp_path: Path
) -> None:
    """In two phases, from one bank; the experts teach a run of their own."""
    choices = {"expert_loss": "denoising", "path_steps": 1, "score_shift": 3.0, "score_draws": 2, "guidance_scale": 2.0}
    plan, bank = {"steps": [3, 2], "shift": 3.0}, {"rollouts.bank": 6}
    each = changed(config, objective=choices, plan=plan, output_dir=str(tmp_path / "whole"), **bank)
    trainer = Trainer(build_run(each))
    experts = PhasedExperts.open(trainer.run())
    used = {"expert_loss": "denoising", "path_steps": 1, "score_shift": 3.0}
    assert experts.manifest.training["objective"] == used and experts.manifest.guidance_scale == 1
    assert experts.manifest.training["method"] == "denoising"
    assert "distilled by denoising the guided samples of `" in card_text(experts.manifest, "experts")
    assert set(trainer.roles.specs) == {"high_noise", "low_noise"}
    rows = metrics(tmp_path / "whole")
    assert all("generator_loss" in row and "fake_loss" not in row and "score_distance" not in row for row in rows)
    unused, few = each.remarks()
    assert unused.startswith("not used with objective.expert_loss denoising: objective.score_draws")
    assert few.startswith("objective.expert_loss denoising: in the 5 steps of this plan its experts are as blurred")
    assert len(changed(each, **{"plan.steps": [20]}).remarks()) == 1
    assert rows == resumed(each, tmp_path / "broken")
    taught = changed(config, **{"model.experts": str(experts.folder), "objective": {"guidance_scale": 1.0}})
    assert len(PhasedExperts.open(Trainer(build_run(taught)).run()).manifest.experts) == 2


def test_gradient_checkpointing_does_not_change_the_numbers(config: DistillConfig, tmp_path: Path) -> None:
    rows = []
    for checkpointing in (False, True):
        own = {"memory.gradient_checkpointing": checkpointing, "output_dir": str(tmp_path / str(checkpointing))}
        run = changed(config, **own)
        Trainer(build_run(run)).run()
        rows.append(metrics(run.output_dir))
    for plain, recomputed in zip(*rows, strict=True):
        assert plain["generator_loss"] == pytest.approx(recomputed["generator_loss"], rel=1e-4)
        assert plain["generator_grad_norm"] == pytest.approx(recomputed["generator_grad_norm"], rel=1e-3)


def test_samples_are_made_in_the_parts_that_updates_are_made_in(config: DistillConfig) -> None:
    """As many at once as memory has room for; the same samples."""
    trainer = Trainer(build_run(changed(config, updates=1, **{"memory.micro_batch_size": 4})))
    trainer.run()
    counts, made = [], []
    decode = trainer.built.family.decode

    def counted(pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
        counts.append(len(latents))
        made.append(decode(pipeline, latents))
        return made[-1]

    with mock.patch.object(trainer.built.family, "decode", counted):
        for size in (None, 4):
            trainer.comparison.run = replace(trainer.built, config=changed(config, **{"memory.micro_batch_size": size}))
            trainer.validate("again")
    assert counts == [6, 4, 2], "three prompts, two seeds"
    torch.testing.assert_close(torch.cat(made[1:]), made[0], atol=1e-4, rtol=0)


def test_full_copies_train_too(config: DistillConfig) -> None:
    role = {"kind": "full", "lr": 1e-4}
    folder = Trainer(build_run(changed(config, generator=role, fake=role, updates=2))).run()
    experts = PhasedExperts.open(folder)
    high, low = experts.tensors("high_noise"), experts.tensors("low_noise")
    assert experts.manifest.experts[0].kind == "full"
    assert any(not torch.equal(high[name], low[name]) for name in high)
    _, code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    variables: dict[str, Any] = {}
    exec(code, variables)  # noqa: S102 - the code that users are told to run
    assert variables["pipe"].transformer is variables["networks"][1]
    assert variables["result"].frames.shape == (1, 1, 16, 16, 3)


def test_several_draws_use_one_rollout(config: DistillConfig) -> None:
    calls = {1: 0, 3: 0}
    for draws in calls:
        trainer = Trainer(build_run(changed(config, draws_per_rollout=draws)))
        trainer.start_phase()
        original = trainer.roles.velocity

        def counted(role: str, *arguments: Any, draws: int = draws, original: Any = original) -> torch.Tensor:
            calls[draws] += role == "high_noise"
            return original(role, *arguments)

        with (
            mock.patch.object(trainer.roles, "velocity", counted),
            mock.patch.object(trainer.training.distiller, "draw_step", return_value=0),
        ):
            trainer.update()
    assert calls[1] == calls[3] == 3, "two fake rollouts and one generator rollout"


def test_a_bad_loss_skips_the_update_is_counted_and_stops_the_run(config: DistillConfig) -> None:
    run = changed(config, max_bad_updates=2, updates=6)
    trainer = Trainer(build_run(run))
    trainer.start_phase()
    before = {name: value.clone() for name, value in trainer.roles.state_dict("high_noise").items()}
    nan = torch.tensor(float("nan"))

    def poisoned(x_s: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        return (x_s * nan).flatten(1).mean(1)

    with (
        mock.patch("pdmd_core.distillation.distribution_matching_loss", poisoned),
        pytest.raises(TrainingStopped, match="2 updates in a row") as error,
    ):
        trainer.run()
    assert "\n" not in str(error.value)
    assert trainer.progress.bad == 2
    assert all(torch.equal(before[name], value) for name, value in trainer.roles.state_dict("high_noise").items())
    assert len(list_checkpoints(run.output_dir / "checkpoints")) == 1


def test_a_changed_configuration_is_not_resumed(config: DistillConfig) -> None:
    Trainer(build_run(config)).run()
    Trainer(build_run(changed(config, **{"monitoring.log_every": 5}), Resume())).run()
    with pytest.raises(ConfigError, match="batch_size: 4 -> 8") as error:
        Trainer(build_run(changed(config, batch_size=8), Resume())).run()
    assert "\n" not in str(error.value)


def test_a_size_the_model_does_not_have_is_one_line(config: DistillConfig) -> None:
    model = {**config.model.model_dump(), "frames": 3}
    with pytest.raises(ConfigError, match="1 \\+ a multiple of 4 frames, found 3"):
        Trainer(build_run(changed(config, model=model)))


def test_learning_rates_fall_to_zero_at_the_end_of_each_phase_and_what_is_logged_is_what_was_used(
    config: DistillConfig,
) -> None:
    trainer = Trainer(build_run(changed(config, updates=[5, 1], lr_decay_share=0.8)))
    used = []
    set_rate = phase.set_rate

    def noted(optimizer: torch.optim.Optimizer, rate: float) -> None:
        used.append(rate / config.generator.lr)
        set_rate(optimizer, rate)

    with mock.patch.object(phase, "set_rate", noted):
        trainer.run()
    factors = [row["lr_factor"] for row in metrics(config.output_dir)]
    assert factors == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.25, 1.0])
    assert used[::2] == pytest.approx(factors)


def test_the_step_of_every_role_goes_down_its_loss(config: DistillConfig) -> None:
    trainer = Trainer(build_run(config))
    trainer.start_phase()
    training, roles = trainer.training, trainer.roles
    for role in (FAKE, training.expert):
        losses = []
        for _ in range(2):
            loss = torch.stack([(parameter - 1).square().sum() for parameter in roles.parameters(role)]).sum()
            losses.append(training._step(role, training._backward(role, loss, torch.zeros(training.batch))).loss)
        assert losses[1] < losses[0]
