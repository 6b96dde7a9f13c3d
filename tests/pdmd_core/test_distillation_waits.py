"""The evaluations of an update do not wait for a GPU: sigmas and masks are looked at on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pdmd_core.batch import Batch, Renoising
from pdmd_core.distillation import PhasedDistiller
from pdmd_core.families.guidance import classifier_free_guidance
from pdmd_core.method import Objective
from pdmd_core.phases import PhasePlan
from tests.helpers.waits import waits

PLAN = PhasePlan.from_steps([2, 2], shift=5.0)


class Factors:
    """A factor for each role, without gradient: autograd asks CUDA for its streams."""

    guide = staticmethod(classifier_free_guidance)

    def __init__(self) -> None:
        roles = ("teacher", "fake", "high_noise", "low_noise")
        self.factors = {role: torch.ones(1, device="cuda") for role in roles}

    def velocity(self, role: str, x: Tensor, sigma: Any, conditioning: Any) -> Tensor:
        return self.factors[role] * x


@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"fake_weighting": "margin", "generator_weighting": "paper"},
        {"fake_rollouts": "whole", "expert_rollouts": "own_increment", "score_draws": 2},
    ],
)
def test_losses_wait_for_nothing(phase: int, choices: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with waits() as found:
        distiller = PhasedDistiller(PLAN, phase, Factors(), Objective(guidance_scale=3.0, **choices))
        noise = torch.empty(2, 3, 4, device="cuda")
        batch = Batch(noise, {"prompt": noise}, {"prompt": noise})
    t = distiller.draw_score_sigma(2, torch.Generator().manual_seed(0))
    monkeypatch.setattr(distiller, "_checked", lambda t: t)  # sigmas, which are on the CPU
    with waits() as found:
        regression = Objective(expert_loss="regression", guidance_scale=3.0)
        PhasedDistiller(PLAN, phase, distiller.networks, regression).path_loss(batch, 0)
        renoisings = [Renoising(t, noise) for _ in range(distiller.objective.score_draws)]
        distiller.fake_loss(distiller.fake_rollout(batch, 1), batch.conditioning, renoisings[0])
        distiller.generator_loss(distiller.expert_rollout(batch, 0), batch, *renoisings)
        assert not found
        noise.cpu(), torch.as_tensor(t, device=noise.device)
        assert len(found) == 2, "what waits is seen"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks CUDA itself, which takes a GPU")
@pytest.mark.parametrize("name", ["wan_two_networks", "qwen_image"])
def test_cuda_says_the_same_of_whole_networks(name: str) -> None:
    from benchmarks.cost.random_training import RandomTraining, small_config, small_teacher
    from training.loop.precision import make_accelerator

    config = small_config(precision="bf16", fake_updates=1, memory={"micro_batch_size": 1})
    training = RandomTraining(config, small_teacher(name, "tiny", 8, "cuda"), make_accelerator("bf16", "cuda"))
    training.update()  # what is made once
    phase, batch = training.training, training.batches.draw(negative=True)
    renoising = training.batches.renoising(phase.distiller, batch.noise)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with phase.accelerator.autocast():
            x_s = phase.distiller.fake_rollout(batch, 0)
            phase.distiller.fake_loss(x_s, batch.conditioning, renoising).backward()
            rollout = phase.distiller.expert_rollout(batch, 0)
            phase.distiller.generator_loss(rollout, batch, renoising).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
