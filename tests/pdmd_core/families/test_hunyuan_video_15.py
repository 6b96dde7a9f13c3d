"""HunyuanVideo 1.5: names, sizes, prompts that are too long."""

from __future__ import annotations

import pytest
from torch import nn

from pdmd_core.families import family
from tests.helpers.families.hunyuan_video_15 import TOKENS, hunyuan_video_15

HUNYUAN = family("hunyuan_video_15")


def test_targets_are_all_linear_layers_of_a_block_but_the_modulation() -> None:
    block = hunyuan_video_15().transformer.transformer_blocks[0]
    linear = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    assert linear == set(HUNYUAN.modules)
    assert linear - set(HUNYUAN.lora_targets) == {"norm1.linear", "norm1_context.linear"}


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("transformer.double_blocks.0.img_attn_q", ("transformer_blocks.0.attn.to_q",)),
        ("diffusion_model.double_blocks.1.txt_mlp.fc2", ("transformer_blocks.1.ff_context.net.2",)),
        (
            "diffusion_model.double_blocks.1.img_attn.qkv",
            tuple(f"transformer_blocks.1.attn.to_{part}" for part in "qkv"),
        ),
        ("lora_unet_double_blocks_2_txt_attn_proj", ("transformer_blocks.2.attn.to_add_out",)),
    ],
)
def test_lora_files_of_others_name_layers_as_the_original_code_or_comfyui(name: str, modules: tuple[str, ...]) -> None:
    place = HUNYUAN.lora_names.place(name)
    assert place is not None and place.names == modules


def test_what_it_does_not_have_is_one_line() -> None:
    pipe = hunyuan_video_15()
    assert HUNYUAN.latent_shape(pipe, 16, 24, 5) == (4, 2, 4, 6)
    for size, words in (((18, 24, 5), "multiples of 4, found 24x18"), ((16, 24, 6), "multiple of 4 frames, found 6")):
        with pytest.raises(ValueError, match=words):
            HUNYUAN.latent_shape(pipe, *size)
    with pytest.raises(
        ValueError, match=f"has {TOKENS} tokens, max_sequence_length is 20: the pipeline cuts prompts at"
    ):
        HUNYUAN.encode_prompts(pipe, ["a panda " * 20], 20)
    assert set(HUNYUAN.encode_prompts(pipe, ["a panda"], 20)) == {
        "prompt_embeds",
        "prompt_mask",
        "glyph_embeds",
        "glyph_mask",
    }


def test_the_call_chooses_the_size_of_clips_from_pictures() -> None:
    pipe = hunyuan_video_15(image=True)
    assert HUNYUAN.latent_shape(pipe, 16, 24, 5) == (4, 2, 4, 6)
    with pytest.raises(ValueError, match="makes clips of 20x20 from pictures of this shape, found 40x40"):
        HUNYUAN.latent_shape(pipe, 40, 40, 5)
