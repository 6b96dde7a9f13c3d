"""Names of FLUX.1 in LoRA files of other programs, its guidance input, the sizes that it has."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import FluxControlPipeline
from torch import Tensor, nn

from pdmd_core.experts.lora.alpha import Alphas
from pdmd_core.experts.lora.file import read_lora
from pdmd_core.families.flux import FluxFamily
from pdmd_core.roles import Roles, RoleSpec
from tests.helpers.families.flux import flux, flux_edit
from tests.helpers.tiny import randn

FLUX = FluxFamily()
RANK = 3


def test_targets_are_all_linear_layers_of_both_kinds_of_blocks_but_the_modulation() -> None:
    """And not the layer at the end, which has the name of one in a block."""
    network = flux().transformer
    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    roles = Roles(network, FLUX, {"expert": RoleSpec("lora", RANK, 1.0)})
    adapted = {key.removesuffix(".lora_A") for key in roles.state_dict("expert") if key.endswith(".lora_A")}
    left_out = {name for name in linear if "norm" not in name and name.startswith(FLUX.blocks)} ^ adapted
    assert not left_out and "single_transformer_blocks.0.proj_out" in adapted
    assert {FLUX.native_module_name(name) for name in adapted} == adapted


def _changes(module: str, rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
    down, up = randn(RANK, columns, seed=1), randn(rows, RANK, seed=2)
    tensors = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up, f"{module}.alpha": torch.tensor(1.0)}
    return tensors, up @ down / RANK


@pytest.mark.parametrize(
    ("module", "block", "parts"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", "transformer_blocks.0", ["attn.to_q", "attn.to_k", "attn.to_v"]),
        (
            "diffusion_model.double_blocks.0.txt_attn.qkv",
            "transformer_blocks.0",
            ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        ),
        (
            "lora_unet_single_blocks_0_linear1",
            "single_transformer_blocks.0",
            ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
        ),
        ("lora_unet_single_blocks_0_modulation_lin", "single_transformer_blocks.0", ["norm.linear"]),
        ("lora_unet_double_blocks_0_txt_mlp_0", "transformer_blocks.0", ["ff_context.net.0.proj"]),
    ],
)
def test_modules_of_the_original_code_are_those_of_diffusers(module: str, block: str, parts: list[str]) -> None:
    """Each weight of the original is the weights of diffusers one below the other, also where their sizes differ."""
    weights = dict(flux().transformer.named_parameters())
    names = [f"{block}.{part}.weight" for part in parts]
    sizes = [weights[name].shape for name in names]
    tensors, change = _changes(module, sum(rows for rows, _ in sizes), sizes[0][1])
    file = read_lora(tensors, Alphas(), FLUX.lora_names, "file")
    assert not file.left_out and set(file.weights) == set(names)
    for name, expected in zip(names, change.split([rows for rows, _ in sizes]), strict=True):
        ((found),) = file.weights[name]
        torch.testing.assert_close(found.dense(), expected)


@torch.no_grad()
def test_guidance_is_an_input_of_the_network_where_it_has_one() -> None:
    x, conditioning = randn(2, 4, 4, 6), {"prompt_embeds": randn(2, 5, 32), "pooled_prompt_embeds": randn(2, 32)}
    seen: list[Tensor | None] = []
    for network in (flux(guidance_embeds=True).transformer, flux(guidance_embeds=False).transformer):
        network.register_forward_pre_hook(lambda n, a, k: seen.append(k["guidance"]), with_kwargs=True)
        FLUX.velocity(network, x, 0.5, conditioning)
    assert torch.equal(seen[0], torch.tensor([3.5, 3.5])) and seen[1] is None
    assert FLUX.guidance_arguments(1.0) == {"true_cfg_scale": 1.0}


def test_a_pipeline_or_a_size_that_is_not_known_is_one_line() -> None:
    parts = flux().components
    control = FluxControlPipeline(**{k: v for k, v in parts.items() if "image" not in k and "feature" not in k})
    for pipeline, size, words in (
        (control, (8, 8, 1), "a FluxPipeline or FluxKontextPipeline, found a FluxControlPipeline"),
        (flux(), (9, 8, 1), "multiples of 2, found 8x9"),
        (flux_edit(), (512, 512, 1), "1024x1024 in this shape, found 512x512"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)) as caught:
            FLUX.latent_shape(pipeline, *size)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match="of 128x128 pixels or more"):
        FLUX.encode_images(
            flux_edit(), [flux_edit().image_processor.numpy_to_pil(torch.zeros(9, 9, 3).numpy())[0]], 896, 1152, 1
        )
    with pytest.raises(ValueError, match="'x' has no weight of its own"):
        FLUX.native_weight_name("x")
