"""Train the embedded AutoencoderKLWan: ``python -m training.embedded.train_autoencoder --output_dir D``.

First pictures (the causal network then sees one frame, which takes a third of the work). Then clips and pictures: the
decoder as a whole, of the encoder only what looks back in time, from zero, so that the latents of pictures stay as they
are.
In between an affine map is folded into the two 1x1x1 convolutions around the latents, so that the latents have the mean
and the standard deviation which every Wan tool subtracts and divides by (``latents_mean``, ``latents_std`` of the stock
configuration).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import nn
from tqdm.auto import tqdm

from pdmd_core.arguments import SEED, whole_number
from training.embedded.emoji import EmojiScenes

CONFIG: dict[str, Any] = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
}


def one_frame_convolution(self: WanCausalConv3d, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
    """The causal convolution where there is a single frame: only the last temporal slice of the kernel meets data."""
    if x.shape[2] == 1 and cache_x is None and self.stride[0] == 1:
        _, right, _, bottom = self._padding[:4]
        plane = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], (bottom, right))
        return plane.unsqueeze(2)
    padding = list(self._padding)
    if cache_x is not None and padding[4] > 0:
        x = torch.cat([cache_x, x], dim=2)
        padding[4] -= cache_x.shape[2]
    return nn.Conv3d.forward(self, F.pad(x, padding))


class PictureAutoencoder(nn.Module):
    """Encode and decode single frames without the temporal cache (equal to ``vae.encode``/``vae.decode``)."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, logvar = self.vae.quant_conv(self.vae.encoder(pixels)).float().chunk(2, dim=1)
        latents = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * torch.randn_like(mean)
        return self.vae.decoder(self.vae.post_quant_conv(latents), first_chunk=True), mean, logvar


def clip_autoencoder(vae: AutoencoderKLWan, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    posterior = vae.encode(pixels).latent_dist
    return vae.decode(posterior.sample()).sample, posterior.mean, posterior.logvar


def loss_of(pixels: torch.Tensor, decoded: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """L1 on pixels and on their spatial differences (edges), plus a small Kullback-Leibler term."""
    decoded = decoded.float()
    error = decoded - pixels
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + edges + 5e-4 * kl


@torch.no_grad()
def initialise(vae: AutoencoderKLWan) -> None:
    """Variance-preserving convolutions (PyTorch's default shrinks the signal at each layer) and little latent noise."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and module.bias is not None:
            last = module.weight[:, :, -1] if module.weight.ndim == 5 else module.weight
            nn.init.kaiming_normal_(last, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    vae.quant_conv.bias[CONFIG["z_dim"] :] = -6


@torch.no_grad()
def start_clips_from_frames(vae: AutoencoderKLWan) -> None:
    """Zero the kernels that look back in time; temporal resampling starts as pick-last and repeat."""
    for name, module in vae.named_modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] == 3:
            module.weight[:, :, :-1] = 0
            if name.endswith("time_conv"):
                module.weight.zero_()
                module.bias.zero_()
                outputs, inputs = module.weight.shape[:2]
                for row in range(outputs):
                    module.weight[row, row % inputs, -1] = 1


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKLWan, batches: Iterator[torch.Tensor]) -> None:
    """Change coordinates of the latents to the stock mean and standard deviation; decoded pixels do not change."""
    means = torch.cat([vae.encode(batch).latent_dist.mean.transpose(0, 1).flatten(1) for batch in batches], dim=1)
    mean, std = means.mean(1), means.std(1)
    target_mean = torch.tensor(vae.config.latents_mean)
    scale = torch.tensor(vae.config.latents_std) / std
    channels = len(mean)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    encode.weight[:channels] *= scale[:, None, None, None, None]
    encode.bias[:channels] = (encode.bias[:channels] - mean) * scale + target_mean
    encode.bias[channels:] += 2 * scale.log()
    offset = mean - target_mean / scale
    decode.bias += (decode.weight[:, :, 0, 0, 0] * offset).sum(1)
    decode.weight /= scale[None, :, None, None, None]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 100 steps, constant, then linear to zero over the last 30 %."""
    return peak * min(1.0, (step + 1) / 100, (steps - step) / (0.3 * steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--picture_steps", type=whole_number(0), default=3500, help="updates of 16 pictures")
    parser.add_argument("--clip_steps", type=whole_number(0), default=1000, help="updates of 4 clips and 6 pictures")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument(
        "--resume_from", type=Path, help="folder of an autoencoder after pictures (output_dir/pictures)"
    )
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    scenes = EmojiScenes(arguments.seed)
    with mock.patch.object(WanCausalConv3d, "forward", one_frame_convolution):
        if arguments.resume_from:
            vae = AutoencoderKLWan.from_pretrained(arguments.resume_from)
        else:
            vae = AutoencoderKLWan(**CONFIG)
            initialise(vae)
            train(vae, scenes, arguments.picture_steps, arguments.lr, clips=False)
            start_clips_from_frames(vae)
            fold_latent_statistics(vae, (scenes.pictures(32).pixels for _ in range(16)))
            vae.save_pretrained(arguments.output_dir / "pictures")
        train(vae, scenes, arguments.clip_steps, arguments.lr / 5, clips=True)
    vae.save_pretrained(arguments.output_dir)


def train(vae: AutoencoderKLWan, scenes: EmojiScenes, steps: int, peak: float, clips: bool) -> None:
    """Adam on batches of 16 pictures, or of 4 clips and 6 pictures."""
    pictures = torch.compile(PictureAutoencoder(vae))
    parameters = clip_parameters(vae) if clips else list(vae.parameters())
    optimizer = torch.optim.Adam(parameters, lr=peak, betas=(0.9, 0.99))
    bar = tqdm(range(steps), desc="clips" if clips else "pictures", mininterval=10)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        pixels = scenes.pictures(6 if clips else 16).pixels
        with torch.autocast("cpu", torch.bfloat16):
            result = pictures(pixels)
        loss_of(pixels, *result).backward()
        if clips:
            pixels = scenes.clips(4).pixels
            with torch.autocast("cpu", torch.bfloat16):
                result = clip_autoencoder(vae, pixels)
            loss_of(pixels, *result).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            bar.set_postfix(l1=f"{(result[0].float() - pixels).abs().mean().item():.4f}")


def clip_parameters(vae: AutoencoderKLWan) -> list[nn.Parameter]:
    """The decoder, and of the encoder what a single frame never meets: kernels that look back in time."""
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    for name, module in vae.encoder.named_modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] == 3:
            module.weight.requires_grad_(True)
            if name.endswith("time_conv"):
                module.bias.requires_grad_(True)
            else:
                module.weight.register_hook(_without_present)
    return [parameter for parameter in vae.parameters() if parameter.requires_grad]


def _without_present(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.clone()
    gradient[:, :, -1] = 0
    return gradient


if __name__ == "__main__":
    main()
