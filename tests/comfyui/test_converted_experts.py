"""Files that ``phased-dmd convert --to comfyui`` writes, in ComfyUI's hands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pdmd_core.experts import PhasedExperts
from pdmd_core.experts.convert import Conversion
from pdmd_core.phases import PhasePlan
from tests.tiny import TEXT_FEATURES, lora_roles, randn, save_wan_pipeline, write_lora_experts

PLAN = PhasePlan.from_steps([2, 2], shift=5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_converted_expert_gives_in_comfyui_what_its_role_gives(pack, tmp_path: Path, dtype: torch.dtype) -> None:
    import comfy.model_management
    import comfy.sd

    roles = lora_roles(PLAN)
    write_lora_experts(tmp_path / "experts", PLAN, roles, str(save_wan_pipeline(tmp_path / "base")))
    Conversion(PhasedExperts.open(tmp_path / "experts"), tmp_path / "out", dtype=dtype).to_comfyui()
    x, context, sigma = randn(2, 16, 3, 4, 6), randn(2, 8, TEXT_FEATURES, seed=1), torch.tensor([0.9, 0.3])
    exact = dtype == torch.float32
    velocities = []
    for phase in PLAN.phases:
        model = comfy.sd.load_diffusion_model(str(tmp_path / "out" / f"{phase.name}.safetensors"))
        comfy.model_management.load_models_gpu([model])
        with torch.no_grad():
            found = model.model.apply_model(x, sigma, c_crossattn=context)
            velocities.append(roles.velocity(phase.name, x, sigma, {"prompt_embeds": context}))
        expected = x - sigma.view(2, 1, 1, 1, 1) * velocities[-1]
        torch.testing.assert_close(found, expected, atol=2e-5 if exact else 0.1, rtol=1e-4 if exact else 0.1)
    assert (velocities[0] - velocities[1]).abs().max() > 0.5
