"""Networks in the original layout give in ComfyUI what they give in diffusers."""

from __future__ import annotations

import torch

from pdmd_core.families.wan_autoencoder import autoencoder_to_native
from tests.helpers.tiny import TEXT_FEATURES, autoencoder, randn, transformer


def test_the_wan_transformer(pack, models) -> None:
    import comfy.model_management

    model = models.wan(seed=3)
    comfy.model_management.load_models_gpu([model])
    x, context, sigma = randn(2, 16, 3, 4, 6), randn(2, 8, TEXT_FEATURES, seed=1), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        x0 = model.model.apply_model(x, sigma, c_crossattn=context)
        velocity = transformer(3)(x, sigma * 1000, context).sample
    torch.testing.assert_close(x0, x - sigma.view(2, 1, 1, 1, 1) * velocity, atol=2e-5, rtol=1e-4)


def test_the_wan_autoencoder(pack) -> None:
    import comfy.ldm.wan.vae

    ours = autoencoder()
    native = comfy.ldm.wan.vae.WanVAE(
        dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    native.load_state_dict(autoencoder_to_native(ours.state_dict()))
    pixels, latents = randn(1, 3, 9, 16, 16), randn(1, 16, 3, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(native.decode(latents), ours.decode(latents).sample, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(native.encode(pixels), ours.encode(pixels).latent_dist.mode(), atol=1e-4, rtol=1e-4)
