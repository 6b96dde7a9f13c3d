"""Full networks in ComfyUI's hands: files of ``phased-dmd convert --to comfyui``, and full experts of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pdmd_core.experts import BaseModel, Expert, Manifest, PhasedExperts, write_experts
from pdmd_core.experts.convert.conversions import Conversion
from pdmd_core.phases import PhasePlan
from tests.helpers.comfyui.phased_models import LOAD, sample, sigmas_of
from tests.helpers.tiny import TEXT_FEATURES, lora_roles, randn, save_wan_pipeline, transformer, write_lora_experts

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


def test_full_experts_take_the_sizes_that_shapes_do_not_tell_from_the_base(
    pack, models, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management
    import comfy.sd

    wide, names = {"attention_head_dim": 24}, [phase.name for phase in PLAN.phases]
    entries = tuple(Expert(name, f"{name}.safetensors", "full", "") for name in names)
    manifest = Manifest(BaseModel("tiny/wide", "WanTransformer3DModel", "wan"), PLAN, entries)
    states = {name: dict(transformer(k, **wide).state_dict()) for k, name in enumerate(names)}
    write_experts(base / "models/phased_experts/wide", manifest, states)
    model, plan = pack.call("PhasedDMDLoadExperts", experts="wide", base_1=models.wan(9, **wide), **LOAD)
    composite = pack.module("comfy_nodes.composite")
    expected = composite.compose(plan, [composite.Expert(models.wan(k, **wide), 1.0) for k in range(2)])
    outputs = [sample(pack, models, each, "wan", sigmas_of(PLAN)) for each in (model, expected)]
    assert torch.equal(*outputs)
    error = pack.module("comfy_nodes.errors").NodeError
    with pytest.raises(
        error, match=r"does not load: .+; connect the base to base_1.+ \(high_noise.safetensors of wide\)"
    ):
        pack.call("PhasedDMDLoadExperts", experts="wide", **LOAD)

    def full(*args: Any, **options: Any) -> Any:
        raise comfy.model_management.OOM_EXCEPTION("no memory")

    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", full)
    with pytest.raises(comfy.model_management.OOM_EXCEPTION):  # as it is: ComfyUI then frees memory
        pack.call("PhasedDMDLoadExperts", experts="wide", **LOAD)
