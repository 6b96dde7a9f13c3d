"""The embedded teacher in ComfyUI gives what it gives in diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.comfyui.server import REPOSITORY

TEACHER = REPOSITORY / "training/embedded/models/teacher"
PROMPT = "a panda on a blue background"


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(TEACHER, dtype=torch.float32)


@pytest.fixture(scope="module")
def loaded(pack) -> tuple[Any, Any, Any]:
    return pack.call("PhasedDMDLoadDiffusersFolder", folder="teacher", tokens=16)


def test_the_text_encoder(pack, pipeline, loaded) -> None:
    (found,) = pack.call("CLIPTextEncode", clip=loaded[1], text=PROMPT)
    expected, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False, max_sequence_length=16)
    torch.testing.assert_close(found[0][0], expected, atol=1e-4, rtol=1e-4)
    (empty,) = pack.call("CLIPTextEncode", clip=loaded[1], text="")
    expected, _ = pipeline.encode_prompt("", do_classifier_free_guidance=False, max_sequence_length=16)
    torch.testing.assert_close(empty[0][0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("frames", [1, 3])
def test_the_autoencoder(pack, pipeline, loaded, frames: int) -> None:
    from pdmd_core.families import family

    latents = torch.randn(1, 16, frames, 8, 8)
    (found,) = pack.call("VAEDecode", vae=loaded[2], samples={"samples": latents})
    # ComfyUI keeps latents as the network has them, diffusers in the scale of sampling
    scaled = loaded[0].model.process_latent_in(latents)
    expected = family("wan").decode(pipeline, scaled)
    torch.testing.assert_close(found, expected[0].permute(0, 2, 3, 1), atol=2e-3, rtol=0)


def test_the_transformer(loaded, pipeline) -> None:
    import comfy.model_management

    comfy.model_management.load_models_gpu([loaded[0]])
    x, context, sigma = torch.randn(2, 16, 3, 8, 8), torch.randn(2, 16, 64), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        x0 = loaded[0].model.apply_model(x, sigma, c_crossattn=context)
        velocity = pipeline.transformer(x, sigma * 1000, context).sample
    torch.testing.assert_close(x0, x - sigma.view(2, 1, 1, 1, 1) * velocity, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "a WanPipeline is expected, found a FluxPipeline"),
        ("model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "has two networks"),
        ("vae/config.json", {"dim_mult": [1, 1, 1, 1]}, "autoencoders with dim_mult [1, 2, 4, 4], found [1, 1, 1, 1]"),
        ("vae/config.json", {"latents_mean": [0.0] * 16}, "latents_mean is not that of Wan, which"),
        ("text_encoder/config.json", {"model_type": "t5"}, "the text encoder is a umt5, found 't5'"),
        ("text_encoder/config.json", {"num_layers": 3}, "the text encoder lacks"),
    ],
)
def test_other_folders_are_refused_in_words(pack, base: Path, file: str, changes: dict[str, Any], message: str) -> None:
    folder = base / "models/diffusers/other"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(TEACHER, folder)
    config = folder / file
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(pack.module("comfy_nodes.errors").NodeError) as caught:
        pack.call("PhasedDMDLoadDiffusersFolder", folder="other", tokens=16)
    assert message in str(caught.value) and "\n" not in str(caught.value)
