"""Stock diffusers samples with the files of an experts folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor

from pdmd_core.experts import PhasedExperts
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import Roles, RoleSpec
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.experts_folder import ALPHA, RANK, WAN
from tests.helpers.tiny import CALL, LATENT_SHAPE, lora_roles, randn, transformer, wan_pipeline, write_lora_experts


@torch.no_grad()
def loop_over_roles(folder: Path, pipeline: WanPipeline, noise: Tensor, order: int = 1) -> Tensor:
    """Euler by hand with the folder's experts as roles; ``order`` -1 asks them in the wrong order."""
    experts = PhasedExperts.open(folder)
    plan, entries = experts.manifest.plan, experts.manifest.experts
    specs = {e.name: RoleSpec("lora", e.rank or 0, e.alpha or 0.0, e.targets) for e in entries}
    roles = Roles(transformer(), WAN, specs)
    for entry in entries:
        roles.load_state_dict(entry.name, experts.lora_state(entry.name))
    conditioning = WAN.encode_prompts(pipeline, [CALL["prompt"]], CALL["max_sequence_length"])
    x = noise
    for phase, entry in zip(plan.phases, entries[::order], strict=True):
        for sigma in phase.sigmas:
            following = [*plan.sigmas, 0.0][plan.sigmas.index(sigma) + 1]
            x = x + (following - sigma) * roles.velocity(entry.name, x, sigma, conditioning)
    return x


@pytest.mark.parametrize("steps", [[3], [2, 2], [1, 1, 2]])
def test_a_stock_pipeline_with_the_lora_files_equals_a_loop_over_roles(tmp_path: Path, steps: list[int]) -> None:
    plan = PhasePlan.from_steps(steps, shift=5.0)
    write_lora_experts(tmp_path, plan, lora_roles(plan, rank=RANK, alpha=ALPHA))
    pipeline = wan_pipeline(PhasedDMDScheduler.from_plan(plan))
    names = [phase.name for phase in plan.phases]
    for name in names:
        pipeline.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)

    def use_expert_of_next_step(pipe: WanPipeline, step: int, timestep: Tensor, tensors: dict[str, Any]) -> Any:
        pipe.set_adapters(names[pipe.scheduler.phase])
        return tensors

    def run() -> Tensor:
        pipeline.set_adapters(names[0])
        return pipeline(
            **CALL,
            num_inference_steps=len(plan.sigmas),
            guidance_scale=1.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(7),
            callback_on_step_end=use_expert_of_next_step,
        ).frames

    noise = randn(1, *LATENT_SHAPE, seed=7)
    expected = loop_over_roles(tmp_path, pipeline, noise)
    for _ in range(2):
        torch.testing.assert_close(run(), expected, rtol=1e-5, atol=1e-5)
    if len(plan) > 1:
        assert (loop_over_roles(tmp_path, pipeline, noise, order=-1) - expected).abs().max() > 0.01
    pipeline.unload_lora_weights()
    teacher = pipeline(
        **CALL,
        num_inference_steps=len(plan.sigmas),
        guidance_scale=1.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(7),
    ).frames
    assert (teacher - expected).abs().max() > 0.01
