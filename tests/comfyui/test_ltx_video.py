"""LTX-Video in ComfyUI: the same velocity under the names of the original code, with and without LoRA experts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from torch import Tensor

from pdmd_core.experts import lora_to_file
from pdmd_core.families import family
from pdmd_core.roles import TEACHER, Roles, RoleSpec
from tests.helpers.comfyui.phased_models import with_lora
from tests.helpers.tiny import randn, randomise

LTX = family("ltx_video")
TEXT, TOKENS = 32, 5
CONDITIONING = {"prompt_embeds": randn(1, TOKENS, TEXT, seed=2), "prompt_mask": torch.ones(1, TOKENS)}


@pytest.fixture(scope="module")
def roles() -> Roles:
    torch.manual_seed(0)
    network = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT,
    )
    found = Roles(network.eval(), LTX, {"high": RoleSpec("lora", 4, 6.0)})
    randomise(found, "high", 1)
    return found


@pytest.fixture(scope="module")
def model(models, roles: Roles) -> Any:
    import comfy.model_management
    import comfy.sd

    state = {LTX.native_weight_name(name): value for name, value in roles.base_state_dict().items()}
    metadata = {"config": json.dumps({"transformer": LTX.comfyui_config(roles.bases["transformer"].config)})}
    found = comfy.sd.load_diffusion_model_state_dict(state, metadata=metadata)
    comfy.model_management.load_models_gpu([found])
    return found


@torch.no_grad()
def velocity(model: Any, x: Tensor, sigma: float) -> Tensor:
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    context = CONDITIONING["prompt_embeds"]
    x_0 = model.model.apply_model(x, torch.tensor([sigma]), c_crossattn=context, attention_mask=None, frame_rate=25)
    return (x - x_0) / sigma


@pytest.mark.parametrize("sigma", [0.9, 0.3])
def test_it_has_the_velocity_that_diffusers_has(model: Any, roles: Roles, sigma: float) -> None:
    x = randn(1, 8, 2, 2, 3)
    with torch.no_grad():
        expected = roles.velocity(TEACHER, x, sigma, CONDITIONING)
    torch.testing.assert_close(velocity(model, x, sigma), expected, rtol=1e-3, atol=1e-3)


def test_lora_experts_count_as_in_training(pack, model: Any, roles: Roles) -> None:
    file = lora_to_file(roles.state_dict("high"), 6.0, LTX)
    patched = with_lora(pack, model, file)
    x = randn(1, 8, 2, 2, 3)
    with torch.no_grad():
        expected, plain = (roles.velocity(role, x, 0.7, CONDITIONING) for role in ("high", TEACHER))
    torch.testing.assert_close(velocity(patched, x, 0.7), expected, rtol=1e-3, atol=1e-3)
    assert (expected - plain).abs().max() > 0.1


def test_the_shift_is_set_by_the_node_whose_timestep_is_sigma(pack, model: Any) -> None:
    (shifted,) = pack.call(LTX.comfyui_sampling, model=model, shift=3.0)
    sampling, own = (each.get_model_object("model_sampling") for each in (shifted, model))
    for sigma in (0.9, 0.2):
        value = torch.tensor(sigma)
        assert float(sampling.timestep(value)) == pytest.approx(float(own.timestep(value))) == pytest.approx(sigma)
