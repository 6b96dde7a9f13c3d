"""How good the embedded teacher is: ``python benchmarks/embedded_teacher.py``. Needs the emoji font.

Measures the autoencoder on fresh scenes (peak signal-to-noise ratio), whether the classifier names what prompts say in
the teacher's pictures, in fresh real pictures for comparison, and whether clips move as their prompts say. Writes
docs/embedded/teacher.json and a contact sheet, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from pdmd_core.arguments import COUNT
from training.data.buckets import SampleSize
from training.embedded.emoji import BACKGROUNDS, EMOJI, EmojiScenes, caption
from training.embedded.features import load_features, see
from training.evaluation.measures import wanted_classes
from training.evaluation.pictures import labelled_columns, save_samples
from training.evaluation.sampler import Sampler

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "training" / "embedded" / "models"
DIRECTIONS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}


def psnr(pixels: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels of pixels in [0, 1], mean over samples."""
    error = (pixels - other).square().flatten(1).mean(1)
    return float((-10 * error.log10()).mean())


def travel(clips: Tensor, background: tuple[float, float, float]) -> Tensor:
    """How far the centre of what is not background moves, first to last frame, in pixels: (count, 2) as x, y."""
    plain = torch.tensor(background).view(3, 1, 1) / 255
    weight = (clips - plain).abs().sum(2).clamp(min=0.15) - 0.15
    place = torch.arange(clips.shape[-1], dtype=torch.float32)
    x = (weight.sum(2) * place).sum(-1) / weight.sum((2, 3)).clamp(min=1e-6)
    y = (weight.sum(3) * place).sum(-1) / weight.sum((2, 3)).clamp(min=1e-6)
    centre = torch.stack([x, y], -1)
    return centre[:, -1] - centre[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=MODELS / "teacher")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs" / "embedded")
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--shift", type=float, default=5.0)
    parser.add_argument("--steps", type=COUNT, default=40)
    arguments = parser.parse_args()
    result: dict[str, float] = {}
    network, emoji, backgrounds = load_features()

    def agreement(pixels: Tensor, prompts: list[str]) -> float:
        seen, wanted = see(network, pixels), wanted_classes(prompts, emoji, backgrounds)
        return float(((seen.emoji == wanted[0]) & (seen.background == wanted[1])).float().mean())

    scenes = EmojiScenes(seed=2026)
    pictures, clips = scenes.pictures(256), scenes.clips(64)
    prompts = [caption(e, b) for e in EMOJI for b in BACKGROUNDS]
    movements = [(e, m) for e in list(EMOJI)[::2] for m in DIRECTIONS]
    clip_prompts = [caption(e, "white", m) for e, m in movements]
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    cache = ROOT / "runs" / "embedded_teacher"
    sampler = Sampler(str(arguments.teacher), SampleSize(64, 64, 1, 16), prompts, cache)
    for name, batch in (("pictures", pictures), ("clips", clips)):
        with torch.no_grad():
            vae = sampler.pipeline.vae
            decoded = torch.cat(
                [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in batch.pixels.split(16)]
            )
        result[f"autoencoder_psnr_{name}"] = round(psnr(decoded / 2 + 0.5, batch.pixels / 2 + 0.5), 2)
    real = pictures.pixels.transpose(1, 2) / 2 + 0.5
    result["agreement_real_pictures"] = round(agreement(real, pictures.captions), 4)
    pairs = [(prompt, seed) for prompt in range(len(prompts)) for seed in range(2)]
    latents = sampler.with_teacher(pairs, arguments.steps, arguments.shift, arguments.guidance_scale)
    pixels = sampler.decode(latents)
    result["agreement_pictures"] = round(agreement(pixels, [prompts[p] for p, _ in pairs]), 4)
    shown = list(range(0, len(prompts), 9))[:24]
    sheet = torch.stack([pixels[2 * p : 2 * p + 2, 0] for p in shown])
    labelled_columns([("teacher", sheet)], [prompts[p] for p in shown]).save(arguments.output_dir / "pictures.png")

    sampler = Sampler(str(arguments.teacher), SampleSize(64, 64, 9, 16), clip_prompts, cache)
    pairs = [(prompt, seed) for prompt in range(len(clip_prompts)) for seed in range(2)]
    latents = sampler.with_teacher(pairs, arguments.steps, arguments.shift, arguments.guidance_scale)
    filmed = sampler.decode(latents)
    moved = travel(filmed, BACKGROUNDS["white"])
    wanted = torch.tensor([DIRECTIONS[movements[p][1]] for p, _ in pairs], dtype=torch.float32)
    along = (moved * wanted).sum(1)
    result["agreement_clips"] = round(agreement(filmed, [clip_prompts[p] for p, _ in pairs]), 4)
    result["clips_that_move_as_said"] = round(float((along > 6).float().mean()), 4)
    result["mean_travel_pixels"] = round(float(along.mean()), 2)
    result["samples_pictures"], result["samples_clips"] = float(2 * len(prompts)), float(len(pairs))
    save_samples(arguments.output_dir / "clips", filmed[: 2 * 8 : 2], columns=4)
    (arguments.output_dir / "teacher.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("\n".join(f"| {name} | {value:g} |" for name, value in result.items() if not math.isnan(value)))


if __name__ == "__main__":
    main()
