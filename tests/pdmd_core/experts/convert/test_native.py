"""Networks in the layout of the original code, which joins what is several layers in diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils

from pdmd_core.experts.convert.native import in_native_layout
from pdmd_core.experts.format.weights import weights_of
from pdmd_core.families import family
from tests.helpers.families.flux2 import flux2
from tests.helpers.families.stable_diffusion_3 import stable_diffusion_3
from tests.helpers.families.z_image import z_image

FLUX = family("flux")
Q, K = (f"transformer_blocks.0.attn.to_{part}.weight" for part in "qk")


@pytest.mark.parametrize(
    ("name", "build", "converter"),
    [
        ("flux2", flux2, "convert_flux2_transformer_checkpoint_to_diffusers"),
        ("stable_diffusion_3", stable_diffusion_3, "convert_sd3_transformer_checkpoint_to_diffusers"),
        ("z_image", z_image, "convert_z_image_transformer_checkpoint_to_diffusers"),
    ],
)
def test_diffusers_own_converter_brings_every_number_back(name: str, build: Callable[[], Any], converter: str) -> None:
    state = build().transformer.state_dict()
    native = in_native_layout(weights_of(state), family(name))
    back = getattr(single_file_utils, converter)({key: native.read(key).clone() for key in native.specs})
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())
    assert native.shapes == {key: tuple(native.read(key).shape) for key in native.specs}


def test_a_network_that_is_not_whole_is_one_line() -> None:
    for names, words in (
        ([Q, K], "to_v.weight' is missing, which double_blocks.0.img_attn.qkv.weight is made of"),
        (["x"], "'x' has no place"),
    ):
        with pytest.raises(ValueError, match=words):
            in_native_layout(weights_of(dict.fromkeys(names, torch.ones(2, 2))), FLUX)
