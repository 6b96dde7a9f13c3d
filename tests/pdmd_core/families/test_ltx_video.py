"""Names of LTX-Video's weights, its LoRA files without alpha, its autoencoders and sizes."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from diffusers import LTXImageToVideoPipeline, LTXPipeline
from diffusers.loaders.single_file_utils import convert_ltx_transformer_checkpoint_to_diffusers

from pdmd_core.experts import Expert, ExpertsError, lora_from_file, lora_to_file
from pdmd_core.families.ltx_video import LtxVideoFamily
from tests.helpers.families.ltx_video import CHANNELS, ltx_video
from tests.helpers.families.parts import use_all_colours
from tests.helpers.tiny import randn

LTX = LtxVideoFamily()
MODULE = "transformer_blocks.1.attn2.to_k"


def test_targets_are_all_linear_layers_of_the_blocks() -> None:
    linear = {n for n, m in ltx_video().transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    blocks = {name for name in linear if name.startswith("transformer_blocks.")}
    assert blocks == {f"transformer_blocks.{block}.{target}" for block in (0, 1) for target in LTX.lora_targets}
    assert {LTX.native_module_name(name) for name in blocks} == blocks, "the native layout is diffusers' own"


def test_diffusers_own_converter_turns_all_native_weight_names_back() -> None:
    state = ltx_video().transformer.state_dict()
    native = {LTX.native_weight_name(name): value for name, value in state.items()}
    assert "patchify_proj.weight" in native and "transformer_blocks.0.attn1.q_norm.weight" in native
    back = convert_ltx_transformer_checkpoint_to_diffusers(dict(native))
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "name", ["", "blocks.0.attn1.to_q.weight", "proj_in", "time_embed.linear.x", f"{MODULE}.alpha"]
)
def test_a_weight_that_it_does_not_have_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        LTX.native_weight_name(name)


def lora(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {f"{MODULE}.lora_A": randn(4, 6).to(dtype), f"{MODULE}.lora_B": randn(5, 4, seed=1).to(dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_is_in_the_weights_as_its_loader_takes_no_other(dtype: torch.dtype) -> None:
    state = lora(dtype)
    file = lora_to_file(state, 6.0, LTX)
    down, up = f"diffusion_model.{MODULE}.lora_A.weight", f"diffusion_model.{MODULE}.lora_B.weight"
    assert set(file) == {down, up} and {value.dtype for value in file.values()} == {dtype}
    read = LTXPipeline.lora_state_dict(dict(file))
    assert set(read) == {f"transformer.{MODULE}.lora_{half}.weight" for half in "AB"}
    assert torch.equal(file[up], (1.5 * state[f"{MODULE}.lora_B"].float()).to(dtype))
    entry = Expert("high", "high.safetensors", "lora", "", rank=4, alpha=LTX.lora_keys.alpha_in_file(4, 6.0))
    found = lora_from_file(file, entry, LTX)
    assert entry.alpha == 4.0 and torch.equal(found[f"{MODULE}.lora_B"], file[up])
    with pytest.raises(ExpertsError, match=r"carry no alpha, which is their rank 4 then, the manifest says 6\.0"):
        lora_from_file(file, replace(entry, alpha=6.0), LTX)
    with pytest.raises(ExpertsError, match=r"'diffusion_model\.x\.alpha' is not diffusion_model\.<module>\.lora_A"):
        lora_from_file(file | {"diffusion_model.x.alpha": torch.tensor(4.0)}, entry, LTX)


@torch.no_grad()
def test_a_decoder_with_timesteps_decodes_at_0_as_the_pipeline_does() -> None:
    pipeline = ltx_video(timestep_conditioning=True)
    use_all_colours(pipeline.vae)
    call = {"prompt": "a panda", "height": 32, "width": 64, "num_frames": 9, "num_inference_steps": 2}
    call |= {"guidance_scale": 1.0, "max_sequence_length": 12, "latents": randn(1, 4, CHANNELS)}
    latents = pipeline._unpack_latents(pipeline(**call, output_type="latent")[0], 2, 1, 2)
    found = LTX.decode(pipeline, latents)
    torch.testing.assert_close(found, pipeline(**call, output_type="pt")[0], rtol=1e-5, atol=1e-5)
    pipeline.vae.decoder.time_embedder.timestep_embedder.linear_2.bias += 1.0
    assert (LTX.decode(pipeline, latents) - found).abs().max() > 1e-3, "the decoder has its timestep"


@pytest.mark.parametrize(
    ("size", "words"),
    [((48, 64, 9), "multiples of 32, found 64x48"), ((32, 0, 9), "found 0x32"), ((32, 32, 8), "of 8 frames, found 8")],
)
def test_a_size_that_it_does_not_have_is_one_line(size: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        LTX.latent_shape(ltx_video(), *size)
    assert len(str(caught.value).splitlines()) == 1


def test_another_pipeline_or_autoencoder_is_one_line() -> None:
    pipeline = ltx_video()
    with pytest.raises(ValueError, match="known as an LTXPipeline, found a LTXImageToVideoPipeline"):
        LTX.latent_shape(LTXImageToVideoPipeline(**pipeline.components), 32, 32, 9)
    pipeline.vae_spatial_compression_ratio = 16
    with pytest.raises(ValueError, match="1 and 1 latents of 16 pixels and 8 frames") as caught:
        LTX.latent_shape(pipeline, 32, 32, 9)
    assert len(str(caught.value).splitlines()) == 1


def test_comfyui_is_told_what_it_would_guess_wrong() -> None:
    assert LTX.comfyui_config(ltx_video().transformer.config) == {
        "in_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "caption_channels": 32,
    }
    released = {"in_channels": 128, "num_attention_heads": 32, "attention_head_dim": 64, "caption_channels": 4096}
    assert LTX.comfyui_config(released) == {}
