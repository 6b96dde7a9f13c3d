"""What is measured of pictures and clips of the embedded teachers, all against one reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.claims.common.evidence import Value
from pdmd_core.metrics import (
    clip_features,
    cosine_distance,
    frechet_distance,
    frechet_estimate,
    kernel_distance,
    manifold,
    mean_of_units,
    optical_flow,
    prompt_agreement,
    seed_diversity,
    share,
    standardised,
)
from pdmd_core.metrics.motion import flow_length, is_dynamic, smoothness
from training.embedded.emoji import BACKGROUNDS, EMOJI, MOTIONS, caption
from training.embedded.features import load_features, see
from training.monitoring.sample_statistics import sample_statistics

DIRECTIONS = {"moves left": (-1.0, 0.0), "moves right": (1.0, 0.0), "moves up": (0.0, -1.0), "moves down": (0.0, 1.0)}
TRAVELS = 6.0
"""A clip moves as its prompt says if its centre travels this many pixels that way; in real clips it is at least 12."""


@dataclass(frozen=True)
class Scene:
    """What a caption says: emoji, background and motion (None for pictures)."""

    emoji: str
    background: str
    motion: str | None

    @property
    def caption(self) -> str:
        return caption(self.emoji, self.background, self.motion)


def all_scenes(clips: bool) -> list[Scene]:
    """Every caption of the closed vocabulary, in the order of ``all_captions``."""
    motions: tuple[str | None, ...] = MOTIONS if clips else (None,)
    return [Scene(emoji, background, motion) for emoji in EMOJI for background in BACKGROUNDS for motion in motions]


def measured_scenes(clips: bool) -> list[Scene]:
    """48 of them: every emoji twice, every background six times, motions as evenly as can be."""
    backgrounds = list(BACKGROUNDS)
    scenes = []
    for number, emoji in enumerate(EMOJI):
        for turn in range(2):
            at = 2 * number + turn
            background = backgrounds[(number + 4 * turn + number // 8) % len(backgrounds)]
            scenes.append(Scene(emoji, background, MOTIONS[at % len(MOTIONS)] if clips else None))
    return scenes


@dataclass(frozen=True)
class Features:
    """Of samples; everything that distances are measured in."""

    style: Tensor
    """(samples, dimensions); a mean over frames."""
    layout: Tensor
    clip: Tensor | None
    """``clip_features`` of style and flow, in their own units; None for pictures."""

    @property
    def distance_space(self) -> Tensor:
        """The features of the Frechet distance that is reported."""
        return self.style if self.clip is None else self.clip

    def to_tensors(self) -> dict[str, Tensor]:
        """For a file."""
        return {"style": self.style, "layout": self.layout} | ({} if self.clip is None else {"clip": self.clip})

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Features:
        """Inverse of ``to_tensors``."""
        return cls(tensors["style"], tensors["layout"], tensors.get("clip"))


@dataclass(frozen=True)
class Measured:
    """Features of samples and everything that needs no reference."""

    features: Features
    diversity: float
    motion: float | None
    extra: dict[str, Value]


class Measures:
    """Measures samples of these scenes, ``seeds`` of each, scene by scene."""

    def __init__(self, scenes: Sequence[Scene], seeds: int) -> None:
        self.scenes = [scene for scene in scenes for _ in range(seeds)]
        self.groups = torch.arange(len(scenes)).repeat_interleave(seeds)
        self.network, emoji, backgrounds = load_features()
        self.wanted = torch.tensor([(emoji.index(s.emoji), backgrounds.index(s.background)) for s in self.scenes])

    def look(self, pixels: Tensor) -> Measured:
        """Samples (count, frames, 3, 64, 64) in [0, 1]."""
        frames = pixels.shape[1]
        seen = see(self.network, pixels.flatten(0, 1)[:, None])
        style, layout = seen.style.unflatten(0, (-1, frames)), seen.layout.unflatten(0, (-1, frames)).mean(1)
        classes = torch.stack([seen.emoji, seen.background], 1).unflatten(0, (-1, frames))[:, frames // 2]
        diversity = seed_diversity(layout, self.groups, cosine_distance)
        agreement = prompt_agreement(classes, self.wanted)
        looks = sample_statistics(pixels, int((self.groups == 0).sum()))
        extra: dict[str, Value] = {
            "saturation": looks.saturation,
            "contrast": looks.contrast,
            "diversity_low": diversity.low,
            "diversity_high": diversity.high,
            "place_spread": self._place_spread(pixels),
            "agreement": agreement.value,
            "agreement_low": agreement.low,
            "agreement_high": agreement.high,
        }
        if frames == 1:
            return Measured(Features(style.mean(1), layout, None), diversity.value, None, extra)
        flow = optical_flow(pixels)
        length = mean_of_units(flow_length(flow).flatten(1).mean(1))
        dynamic, smooth, as_said = share(is_dynamic(flow)), mean_of_units(smoothness(pixels)), self._as_said(pixels)
        extra |= {
            "motion_low": length.low,
            "motion_high": length.high,
            "dynamic_degree": dynamic.value,
            "dynamic_degree_low": dynamic.low,
            "dynamic_degree_high": dynamic.high,
            "smoothness": smooth.value,
            "moves_as_said": as_said,
        }
        features = Features(style.mean(1), layout, clip_features(style, flow).float())
        return Measured(features, diversity.value, length.value, extra)

    def _centres(self, frames: Tensor) -> Tensor:
        """Where the emoji is, (count, 2) as x, y in pixels: the centre of what has not the background's colour.

        frames: (count, 3, height, width), the background that was asked for. The middle of a picture with nothing.
        """
        plain = torch.tensor([BACKGROUNDS[scene.background] for scene in self.scenes]).view(-1, 3, 1, 1) / 255
        weight = ((frames - plain).abs().sum(1) - 0.15).clamp(min=0) + 1e-6
        place = torch.arange(frames.shape[-1], dtype=torch.float32)
        total = weight.sum((1, 2))
        return torch.stack([(weight.sum(1) * place).sum(1) / total, (weight.sum(2) * place).sum(1) / total], 1)

    def _place_spread(self, pixels: Tensor) -> float:
        """Root mean square distance in pixels of the emoji's place (middle frame) from its mean over seeds."""
        centres = self._centres(pixels[:, pixels.shape[1] // 2])
        seeds = int((self.groups == 0).sum())
        by_prompt = centres.unflatten(0, (-1, seeds))
        square = (by_prompt - by_prompt.mean(1, keepdim=True)).square().sum(-1)
        return float((square.sum(1) / (seeds - 1)).mean().sqrt())

    def _as_said(self, pixels: Tensor) -> float | None:
        """Share of clips that travel TRAVELS pixels the way the prompt says; None where no prompt says one."""
        way = torch.tensor([DIRECTIONS.get(scene.motion or "", (0.0, 0.0)) for scene in self.scenes])
        along = ((self._centres(pixels[:, -1]) - self._centres(pixels[:, 0])) * way).sum(1)
        said = way.abs().sum(1) > 0
        return float((along[said] > TRAVELS).float().mean()) if bool(said.any()) else None


def distances(
    features: Features, reference: Features, data: Features | None, seeds: int, resamples: int
) -> dict[str, Value]:
    """Distances to the reference samples, and to the data if given, as columns of a row.

    Sets are scene by scene, ``seeds`` of each. Clips are compared with each feature in units of the reference's
    standard deviation.
    """
    sets = [reference.distance_space, features.distance_space]
    sets += [] if data is None else [data.distance_space]
    if reference.clip is not None:
        sets = list(standardised(*sets))
    of_reference, of_samples = sets[:2]
    frechet = frechet_estimate(of_samples, of_reference, (seeds, seeds), resamples)
    kernel = kernel_distance(of_samples, of_reference)
    reached = manifold(features.layout, reference.layout)
    columns: dict[str, Value] = {
        "frechet": frechet.raw,
        "frechet_corrected": frechet.corrected.value,
        "frechet_low": frechet.corrected.low,
        "frechet_high": frechet.corrected.high,
        "frechet_layout": frechet_distance(features.layout, reference.layout),
        "kernel_distance": kernel.value,
        "kernel_distance_deviation": kernel.deviation,
        "precision": reached.precision.value,
        "recall": reached.recall.value,
        "coverage": reached.coverage.value,
        "frechet_data": frechet_distance(of_samples, sets[2]) if data is not None else None,
    }
    if reference.clip is not None:
        columns["frechet_frames"] = frechet_distance(features.style, reference.style)
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in columns.items()}
