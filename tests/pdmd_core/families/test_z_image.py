"""Names of Z-Image's modules; what it samples is in test_families_pipelines.py."""

from __future__ import annotations

import re

import pytest
import torch

from pdmd_core.families.z_image import ZImageFamily
from tests.helpers.families.z_image import z_image

Z_IMAGE = ZImageFamily()
BLOCKS = ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0")


def test_targets_are_all_linear_layers_of_the_blocks_but_the_modulation() -> None:
    linear = {n for n, m in z_image().transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    blocks = {n for n in linear if n.startswith(("layers.", "noise_refiner.", "context_refiner."))}
    targets = {f"{block}.{target}" for block in BLOCKS for target in Z_IMAGE.lora_targets}
    assert blocks - targets == {n for n in blocks if "adaLN_modulation" in n} and targets <= blocks
    assert {Z_IMAGE.native_module_name(name) for name in targets} == targets
    assert {Z_IMAGE.diffusers_module_name(name) for name in targets} == targets


@pytest.mark.parametrize("name", ["", "layers.x.attention.to_q", "layers.0.attention.norm_q", "cap_embedder.1"])
def test_a_module_that_cannot_be_adapted_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        Z_IMAGE.native_module_name(name)
