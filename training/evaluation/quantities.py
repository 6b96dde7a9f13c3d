"""The numbers of a report: what each one is, what it is computed from, and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pdmd_core.metrics import Estimate
from training.evaluation.measures import FeatureSpace, RewardMeasure

Rows = Mapping[str, Mapping[str, Tensor]]
"""What was measured of a method's samples: name of a measure to its tensors, one row a sample, prompt by prompt."""


@dataclass(frozen=True)
class Quantity:
    """What a number of a report is."""

    key: str
    """Its name in report.json."""
    label: str
    """Its name for people."""
    text: str
    """Its definition."""
    better: Literal["lower", "higher", "near the teacher's"]
    """Which values are good."""
    units: str
    """What its interval is over: samples, clips or prompts."""
    style: str = ".4g"
    """How it is printed, as ``format`` takes it."""
    source: str = ""
    """Where the measure is from."""


@dataclass(frozen=True)
class Measurement:
    """A number of one method."""

    quantity: Quantity
    """What it is."""
    estimate: Estimate
    """The value, with its interval where it has one."""


@dataclass(frozen=True)
class Setting:
    """What all methods of a report share."""

    prompts: int
    """The number of prompts."""
    seeds: int
    """The number of samples of each prompt."""
    frames: int
    """Frames of a sample; 1 for pictures."""
    spaces: Sequence[FeatureSpace]
    """Where features are compared. The first is the main one: keys of its metrics have no suffix."""
    wanted: Tensor | None
    """Classes that each prompt names, of shape (prompts, attributes); None without a classifier."""
    lpips: Callable[[Tensor, Tensor], Tensor] | None
    """Distances of pairs of pictures (pairs, 3, height, width) in [0, 1]."""
    data: Rows | None
    """What was measured of real pictures or clips."""
    reward: RewardMeasure | None = None
    """Rewards pictures for what their prompts ask for."""

    @property
    def groups(self) -> Tensor:
        """The prompt of each sample, as indices of shape (samples,)."""
        return torch.arange(self.prompts).repeat_interleave(self.seeds)

    @property
    def both_seeds(self) -> tuple[int, int]:
        """Samples of each prompt, of a method and of the reference."""
        return self.seeds, self.seeds

    def key(self, name: str, space: FeatureSpace) -> str:
        """The key of a metric in a space of features."""
        return name if space is self.spaces[0] else f"{name}_{space.name}"


@dataclass(frozen=True)
class Metric:
    """One name of ``--metrics``."""

    text: str
    """What it tells, in a few words."""
    source: str
    """Where the measure is from."""
    measure: Callable[[Setting, Rows, Rows], list[Measurement]]
    """Computes it from the setting, a method's rows and those of the reference."""
    seeds: int = 1
    """The seeds of each prompt that it needs."""
    samples: int = 1
    """The samples that it needs."""
    frames: int = 1
    """The frames that it needs: 2 for clips alone."""
    needs: Literal["classifier", "lpips", "image_reward", "data"] | None = None
    """What has to be there."""
    to_teacher: bool = False
    """Whether it compares with the reference."""
    in_features: bool = True
    """Whether it is computed in features."""
    of_motion: bool = False
    """Whether it needs optical flow."""


def inapplicable(metric: Metric, frames: int, has: Collection[str]) -> str | None:
    """Say why a metric tells nothing of such samples.

    Args:
        metric: The metric.
        frames: Frames of a sample.
        has: Those of ``Metric.needs`` that are there.

    Returns:
        The reason; None when the metric applies.
    """
    if frames < metric.frames:
        return f"is for clips, these samples have {frames} frame"
    missing = {
        "classifier": "needs a classifier that knows the prompts: there is one for the embedded teacher's only",
        "lpips": "needs --lpips_weights BACKBONE HEADS",
        "image_reward": "needs --image_reward FOLDER",
        "data": "needs --data FOLDER",
    }
    return missing[metric.needs] if metric.needs is not None and metric.needs not in has else None


def shortage(metric: Metric, prompts: int, seeds: int) -> str | None:
    """Say of what there are too few samples for a metric.

    Args:
        metric: The metric.
        prompts: The number of prompts.
        seeds: The number of samples of each prompt.

    Returns:
        The reason; None when there are enough.
    """
    if seeds < metric.seeds:
        return f"needs at least {metric.seeds} seeds for each prompt, found {seeds}: raise --seeds"
    if prompts * seeds < metric.samples:
        return f"needs at least {metric.samples} samples, found {prompts * seeds}: raise --seeds or give more prompts"
    return None
