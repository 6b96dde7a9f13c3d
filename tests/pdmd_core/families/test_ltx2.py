"""LTX-2: clip and sound in one latent, newer networks, names, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import LTX2ConditionPipeline, LTX2ImageToVideoPipeline, LTX2VideoTransformer3DModel
from torch import Tensor

from pdmd_core.families import family, family_of_lora
from pdmd_core.phases import PhasePlan
from pdmd_core.pipelines import attach_experts
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.families.ltx2 import CASES, CHANNELS, SOUND, ltx2
from tests.helpers.families.parts import picture
from tests.helpers.tiny import randn
from tests.helpers.tiny_pipelines import lora_experts

LTX2 = family("ltx2")
NEWER = {
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "rope_type": "split",
}
"""What LTX-2.3 has and LTX-2 has not."""


@pytest.mark.parametrize("changes", [{}, NEWER], ids=["2.0", "2.3"])
@torch.no_grad()
def test_clip_and_sound_are_what_the_network_makes_of_both(changes: dict[str, Any]) -> None:
    config = ltx2().transformer.config
    torch.manual_seed(0)
    network = LTX2VideoTransformer3DModel.from_config({**config, **changes}).eval()
    x, sigma = randn(2, CHANNELS + 8, 2, 2, 5), torch.tensor([0.9, 0.4])
    shapes = LTX2.conditioning_shapes(network.config, 6, x.shape[1:])
    conditioning = {name: randn(2, *shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    conditioning["prompt_mask"] = torch.ones(2, 6)
    found = LTX2.velocity(network, x, sigma, conditioning)
    length = round(9 / 24 * 25)
    sound = x[:, CHANNELS:].flatten(1)[:, : length * SOUND].view(2, 1, length, SOUND)
    clip, heard = network(
        hidden_states=x[:, :CHANNELS].flatten(2).mT,
        audio_hidden_states=sound.transpose(1, 2).flatten(2),
        encoder_hidden_states=conditioning["prompt_embeds"],
        audio_encoder_hidden_states=conditioning["prompt_audio_embeds"],
        timestep=sigma * 1000,
        sigma=sigma * 1000,
        num_frames=2,
        height=2,
        width=5,
        audio_num_frames=length,
        return_dict=False,
    )
    torch.testing.assert_close(found[:, :CHANNELS], clip.mT.unflatten(2, (2, 2, 5)))
    rest = found[:, CHANNELS:].flatten(1)
    torch.testing.assert_close(rest[:, : length * SOUND], heard.flatten(1))
    x_0 = x[:, CHANNELS:].flatten(1) - sigma[:, None] * rest
    torch.testing.assert_close(x_0[:, length * SOUND :], torch.zeros(2, 16), msg="means nothing")


def test_the_sound_of_a_pipeline_is_that_of_its_experts(tmp_path: Any) -> None:
    """The call copies the scheduler for the sound."""
    case, plan = CASES["ltx2"], PhasePlan.from_steps([2, 2], shift=5.0)
    folder = lora_experts(tmp_path, ltx2(), plan)
    call = {**case.call, "num_inference_steps": 4, "output_type": "latent", "return_dict": False}

    def sampled(pipe: Any, **more: Any) -> tuple[Tensor, Tensor]:
        return pipe(**call, **more, generator=torch.Generator().manual_seed(0))

    def use_expert_of_next_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.transformer.set_adapters(names[pipe.scheduler.phase])
        return tensors

    stock, names = ltx2(), [phase.name for phase in plan.phases]
    plain = sampled(ltx2(), **LTX2.guidance_arguments(1.0))
    for name in names:
        stock.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name=name)
    stock.transformer.set_adapters(names[0])
    stock.scheduler = PhasedDMDScheduler.from_plan(plan)
    by_hand = sampled(stock, **LTX2.guidance_arguments(1.0), callback_on_step_end=use_expert_of_next_step)
    for found, expected, other in zip(sampled(attach_experts(ltx2(), folder)), by_hand, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert (found - other).abs().max() > 0.1


def test_its_lora_files_are_told_by_their_names() -> None:
    network = ltx2().transformer
    native = {LTX2.lora_names.native_weight(name) for name in network.state_dict()}
    assert None not in native and len(native) == len(network.state_dict())
    assert "audio_patchify_proj.weight" in native
    assert "av_ca_a2v_gate_adaln_single.emb.timestep_embedder.linear_1.bias" in native
    assert "transformer_blocks.0.scale_shift_table_a2v_ca_video" in native
    assert isinstance(family_of_lora(["diffusion_model.transformer_blocks.3.audio_attn1.to_q"]), type(LTX2))
    assert family_of_lora(["diffusion_model.transformer_blocks.3.attn1.to_q"]) is None
    with pytest.raises(ValueError, match="hold the connectors of the text encoder too: use LoRA experts"):
        LTX2.native_weight_name("proj_in.weight")


def test_released_sizes_and_others() -> None:
    pipe = ltx2()
    assert LTX2.latent_shape(pipe, *CASES["ltx2"].size) == (CHANNELS + 8, 2, 2, 5)
    with pytest.raises(ValueError, match="sides that are multiples of 32, found 100x64"):
        LTX2.latent_shape(pipe, 64, 100, 9)
    with pytest.raises(ValueError, match="1 \\+ a multiple of 8 frames, found 8"):
        LTX2.latent_shape(pipe, 64, 64, 8)
    other = LTX2ConditionPipeline(**pipe.components)
    with pytest.raises(ValueError, match="LTX2Pipeline or LTX2ImageToVideoPipeline, found a LTX2ConditionPipeline"):
        LTX2.latent_shape(other, 64, 64, 9)


@torch.no_grad()
def test_pictures_are_compressed_as_clips_are() -> None:
    """By diffusers' own encoder of clips, for which the other tests have another."""
    pipe = ltx2(LTX2ImageToVideoPipeline)
    seen = picture(size=(160, 64))
    call = {"prompt": "a", "image": seen, "height": 64, "width": 160, "num_frames": 9, "max_sequence_length": 24}
    call |= {"num_inference_steps": 1, "output_type": "latent", **LTX2.guidance_arguments(1.0)}
    vae = pipe.vae
    clip = pipe._normalize_latents(pipe(**call)[0], vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    found = LTX2.encode_images(pipe, [seen], 64, 160, 9)["first_frame"]
    torch.testing.assert_close(found, clip[:, :, :1], rtol=1e-4, atol=1e-4)
