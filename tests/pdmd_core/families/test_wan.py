from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor

from pdmd_core.families import TeacherRouting
from pdmd_core.families.wan import WanFamily
from pdmd_core.phases import PhasePlan
from tests.helpers.families.wan import wan_image_two_networks, wan_two_networks
from tests.helpers.tiny import CALL, LATENT_CHANNELS, LATENT_SHAPE, randn, save_wan_pipeline, transformer, wan_pipeline

WAN = WanFamily()
NATIVE = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


SECOND = ["transformer_2", "transformer_2"]
RELEASED = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "text_dim": 4096,
    "freq_dim": 256,
    "eps": 1e-6,
    "cross_attn_norm": True,
    "patch_size": (1, 2, 2),
    "out_channels": 16,
}
"""What matters of Wan 14B's config."""


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    return wan_pipeline()


def run_and_record(pipeline: WanPipeline, **arguments: Any) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """A stock call without guidance: the latents, and what the transformer was given and returned at each step."""
    calls: list[dict[str, Tensor]] = []

    def record(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        calls.append({**{k: v for k, v in kwargs.items() if isinstance(v, Tensor)}, "velocity": output[0]})

    handle = pipeline.transformer.register_forward_hook(record, with_kwargs=True)
    try:
        call = CALL | {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"} | arguments
        latents = pipeline(**call, generator=torch.Generator().manual_seed(0)).frames
    finally:
        handle.remove()
    return latents, calls


@torch.no_grad()
def test_velocity_equals_the_pipeline_s_own_transformer_call(pipeline: WanPipeline) -> None:
    prompts = ["a panda", "two red boats"]
    _, calls = run_and_record(pipeline, prompt=prompts)
    conditioning = WAN.encode_prompts(pipeline, prompts, CALL["max_sequence_length"])
    sigmas = pipeline.scheduler.sigmas[:-1]
    assert len(calls) == len(sigmas) == 3
    for call, sigma in zip(calls, sigmas, strict=True):
        assert torch.equal(call["encoder_hidden_states"], conditioning["prompt_embeds"])
        x = call["hidden_states"]
        for form in (float(sigma), sigma, sigma.expand(2)):
            assert torch.equal(WAN.velocity(pipeline.transformer, x, form, conditioning), call["velocity"])


@torch.no_grad()
def test_velocity_of_half_precision_weights_equals_the_pipeline_s_own_call(tmp_path: Path) -> None:
    folder = save_wan_pipeline(tmp_path / "wan")
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    kept = {p.dtype for p in pipeline.transformer.parameters()}
    assert kept == {torch.bfloat16, torch.float32}, "diffusers keeps some of the weights in float32"
    _, calls = run_and_record(pipeline)
    conditioning = WAN.encode_prompts(pipeline, [CALL["prompt"]], CALL["max_sequence_length"])
    for call, sigma in zip(calls, pipeline.scheduler.sigmas[:-1], strict=True):
        x = call["hidden_states"].float()
        assert torch.equal(WAN.velocity(pipeline.transformer, x, sigma, conditioning), call["velocity"])


@torch.no_grad()
def test_each_sample_of_a_batch_has_its_own_sigma(pipeline: WanPipeline) -> None:
    x = randn(2, *LATENT_SHAPE)
    both = WAN.encode_prompts(pipeline, ["a panda", "a boat"], 12)["prompt_embeds"]
    sigmas = torch.tensor([0.95, 0.2])
    together = WAN.velocity(pipeline.transformer, x, sigmas, {"prompt_embeds": both})
    for i in range(2):
        alone = WAN.velocity(pipeline.transformer, x[i : i + 1], float(sigmas[i]), {"prompt_embeds": both[i : i + 1]})
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)
    swapped = WAN.velocity(pipeline.transformer, x, sigmas.flip(0), {"prompt_embeds": both})
    assert (swapped - together).abs().max() > 1e-3


@pytest.mark.parametrize("length", [4, 12])
def test_encode_prompts_equals_the_pipeline_s_encode_prompt(pipeline: WanPipeline, length: int) -> None:
    prompts = ["a panda  &amp; a boat", "", "a text that is much longer than twelve tokens"]
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)
    found = WAN.encode_prompts(pipeline, prompts, length)
    assert set(found) == {"prompt_embeds"}
    assert torch.equal(found["prompt_embeds"], expected)
    assert found["prompt_embeds"].shape[:2] == (3, length)
    assert not found["prompt_embeds"].requires_grad


@pytest.mark.parametrize("frames", [1, 5])
def test_decode_equals_the_pipeline_s_decoding_of_the_same_latents(frames: int) -> None:
    pipeline = wan_pipeline()
    vae = pipeline.vae
    vae.register_to_config(latents_mean=[0.1 * i for i in range(LATENT_CHANNELS)])
    vae.register_to_config(latents_std=[1.0 + 0.2 * i for i in range(LATENT_CHANNELS)])
    with torch.no_grad():  # so that the pixels use the whole range
        vae.decoder.conv_out.weight.mul_(20)
    latents, _ = run_and_record(pipeline, num_frames=frames)
    expected, _ = run_and_record(pipeline, num_frames=frames, output_type="pt")
    found = WAN.decode(pipeline, latents)
    assert found.shape == (1, frames, 3, CALL["height"], CALL["width"])
    assert found.dtype == torch.float32 and found.min() == 0 and found.max() == 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    without_statistics = WAN.decode(wan_pipeline(), latents)
    assert (without_statistics - found).abs().max() > 0.1


@pytest.mark.parametrize(("height", "width", "frames"), [(32, 16, 5), (16, 16, 1), (16, 48, 9)])
def test_latent_shape_is_that_of_the_pipeline_s_latents(
    pipeline: WanPipeline, height: int, width: int, frames: int
) -> None:
    latents, _ = run_and_record(pipeline, height=height, width=width, num_frames=frames, num_inference_steps=1)
    assert WAN.latent_shape(pipeline, height, width, frames) == tuple(latents.shape[1:])


@pytest.mark.parametrize(
    ("size", "found"),
    [
        ((24, 16, 1), "found 16x24"),
        ((16, 40, 1), "found 40x16"),
        ((0, 16, 1), "found 16x0"),
        ((16, -16, 1), "found -16x16"),
        ((16, 16, 0), "found 0"),
        ((16, 16, -3), "found -3"),
        ((16, 16, 4), "found 4"),
    ],
)
def test_a_size_that_wan_does_not_have_is_a_one_line_error(
    pipeline: WanPipeline, size: tuple[int, int, int], found: str
) -> None:
    with pytest.raises(ValueError, match=found + "$") as caught:
        WAN.latent_shape(pipeline, *size)
    assert len(str(caught.value).splitlines()) == 1


# --- names ------------------------------------------------------------------


def test_module_names_are_those_of_the_original_layout_and_back() -> None:
    assert set(WAN.lora_targets) == set(NATIVE)
    for diffusers_name, native in NATIVE.items():
        for block in (0, 7, 39):
            assert WAN.native_module_name(f"blocks.{block}.{diffusers_name}") == f"blocks.{block}.{native}"
            assert WAN.diffusers_module_name(f"blocks.{block}.{native}") == f"blocks.{block}.{diffusers_name}"


def test_lora_targets_are_every_linear_layer_of_every_block() -> None:
    network = transformer()
    linear = {n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("blocks.")}
    assert linear == {f"blocks.{block}.{target}" for block in (0, 1) for target in WAN.lora_targets}


def test_diffusers_reads_our_native_names_as_the_modules_they_came_from() -> None:
    modules = [f"blocks.{block}.{target}" for block in (0, 1) for target in WAN.lora_targets]
    state = {}
    for module in modules:
        native = f"diffusion_model.{WAN.native_module_name(module)}"
        state |= {f"{native}.lora_down.weight": torch.ones(2, 3), f"{native}.lora_up.weight": torch.ones(3, 2)}
        state[f"{native}.alpha"] = torch.tensor(2.0)
    read = WanPipeline.lora_state_dict(state)
    assert set(read) == {f"transformer.{module}.lora_{half}.weight" for module in modules for half in "AB"}


@pytest.mark.parametrize(
    "name",
    [
        "patch_embedding",
        "blocks.0",
        "blocks.0.attn1.norm_q",
        "blocks.x.attn1.to_q",
        "xblocks.0.attn1.to_q",
        "blocks.0.attn1.to_q.bias",
        "blocks.0.self_attn.q",
        "blocks.0.attn1.to_q\n",
    ],
)
def test_a_module_without_a_native_name_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        WAN.native_module_name(name)


def test_a_native_module_that_is_no_target_is_an_error_that_names_it() -> None:
    for name in ("blocks.0.attn1.to_q", "head.head", "blocks.0.self_attn.norm_q", "time_embedding.0"):
        with pytest.raises(ValueError, match=re.escape(repr(name))):
            WAN.diffusers_module_name(name)


@pytest.fixture(scope="module")
def image_to_video_network() -> WanTransformer3DModel:
    """With the weights that only image-to-video models have."""
    config = {k: v for k, v in transformer().config.items() if k != "_use_default_values"}
    config |= {"added_kv_proj_dim": 24, "image_dim": 20, "in_channels": 36}
    torch.manual_seed(1)
    return WanTransformer3DModel.from_config(config)


def native(network: WanTransformer3DModel) -> dict[str, Tensor]:
    return {WAN.native_weight_name(name): value for name, value in network.state_dict().items()}


@pytest.mark.parametrize("kind", ["text", "image"])
def test_diffusers_own_converter_turns_all_native_weight_names_back(
    kind: str, image_to_video_network: WanTransformer3DModel
) -> None:
    network = transformer() if kind == "text" else image_to_video_network
    state = network.state_dict()
    assert ("condition_embedder.image_embedder.norm1.weight" in state) == (kind == "image")
    names = native(network)
    assert len(names) == len(state)
    back = convert_wan_transformer_to_diffusers(names)
    assert set(back) == set(state)
    assert all(back[name] is value or torch.equal(back[name], value) for name, value in state.items())


def test_native_weight_names_are_those_of_the_original_code() -> None:
    names = {
        "patch_embedding.weight": "patch_embedding.weight",
        "condition_embedder.time_embedder.linear_1.weight": "time_embedding.0.weight",
        "condition_embedder.time_embedder.linear_2.bias": "time_embedding.2.bias",
        "condition_embedder.time_proj.weight": "time_projection.1.weight",
        "condition_embedder.text_embedder.linear_1.bias": "text_embedding.0.bias",
        "condition_embedder.text_embedder.linear_2.weight": "text_embedding.2.weight",
        "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
        "condition_embedder.image_embedder.norm2.weight": "img_emb.proj.4.weight",
        "blocks.39.attn1.to_out.0.bias": "blocks.39.self_attn.o.bias",
        "blocks.0.attn2.norm_q.weight": "blocks.0.cross_attn.norm_q.weight",
        "blocks.0.attn2.add_k_proj.weight": "blocks.0.cross_attn.k_img.weight",
        "blocks.0.attn2.norm_added_k.weight": "blocks.0.cross_attn.norm_k_img.weight",
        "blocks.0.norm2.weight": "blocks.0.norm3.weight",
        "blocks.0.ffn.net.0.proj.weight": "blocks.0.ffn.0.weight",
        "blocks.0.scale_shift_table": "blocks.0.modulation",
        "scale_shift_table": "head.modulation",
        "proj_out.bias": "head.head.bias",
    }
    assert {name: WAN.native_weight_name(name) for name in names} == names


def test_lora_names_and_weight_names_agree() -> None:
    for module in WAN.lora_targets:
        name = f"blocks.3.{module}"
        assert WAN.native_weight_name(f"{name}.weight") == f"{WAN.native_module_name(name)}.weight"


@pytest.mark.parametrize(
    "name", ["", "blocks.0.norm3.weight", "blocks.0.attn1.to_q", "blocks.0.self_attn.q.weight", "x.proj_out.weight"]
)
def test_a_weight_that_wan_does_not_have_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        WAN.native_weight_name(name)


# --- other tools ------------------------------------------------------------


def test_comfyui_is_told_what_the_shapes_of_a_small_network_do_not_tell() -> None:
    assert WAN.comfyui_config(RELEASED) == {}
    assert WAN.comfyui_config(transformer().config) == {"num_heads": 2, "text_dim": 32, "freq_dim": 32}
    changes = {"eps": 1e-5, "cross_attn_norm": False, "patch_size": (1, 1, 1)}
    told = {"eps": 1e-5, "cross_attn_norm": False, "patch_size": [1, 1, 1], "out_dim": 16}
    assert WAN.comfyui_config(RELEASED | changes) == told


@pytest.mark.parametrize("steps", [[2, 2], [1, 1], [3, 1]])
def test_the_stock_boundary_lies_strictly_between_the_phases(steps: list[int]) -> None:
    plan = PhasePlan.from_steps(steps, shift=5.0)
    ratio = WAN.stock_routing(plan, ["transformer", "transformer_2"])["boundary_ratio"]
    assert plan.phases[0].sigmas[-1] > ratio > plan.phases[1].sigmas[0]


def test_several_phases_can_share_a_stock_network() -> None:
    plan = PhasePlan.from_steps([1, 1, 1], shift=5.0)
    for components, later in ((["transformer", "transformer", "transformer_2"], 2), (["transformer", *SECOND], 1)):
        ratio = WAN.stock_routing(plan, components)["boundary_ratio"]
        assert plan.phases[later - 1].sigmas[-1] > ratio > plan.phases[later].sigmas[0]
    assert WAN.stock_routing(plan, ["transformer"] * 3) == {"boundary_ratio": None}


@pytest.mark.parametrize(
    "components",
    [["transformer", "transformer_2", "transformer_3"], ["transformer_2", "transformer"], ["transformer_2"]],
)
def test_what_a_stock_pipeline_cannot_route_is_one_line(components: list[str]) -> None:
    plan = PhasePlan.from_steps([1] * len(components), shift=5.0)
    with pytest.raises(ValueError, match=", ".join(components)) as caught:
        WAN.stock_routing(plan, components)
    assert len(str(caught.value).splitlines()) == 1


def test_two_networks_are_routed_as_the_pipeline_s_config_says() -> None:
    for build, boundary in ((wan_two_networks, 0.875), (wan_image_two_networks, 0.9)):
        assert WAN.teacher_routing(build().config) == TeacherRouting(("transformer", "transformer_2"), boundary)
    stock = ["diffusers", "WanTransformer3DModel"]
    one = TeacherRouting()
    assert WAN.teacher_routing(wan_pipeline().config) == one
    assert WAN.teacher_routing({"transformer": stock, "transformer_2": [None, None], "boundary_ratio": 0.9}) == one
    assert WAN.teacher_routing({"transformer": stock, "transformer_2": stock, "boundary_ratio": None}) == one
