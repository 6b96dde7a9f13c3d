"""Metrics by name: from what was measured of a method's samples, and of the reference, to numbers with intervals."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pdmd_core.metrics import (
    Estimate,
    cosine_distance,
    euclidean_distance,
    frechet_estimate,
    kernel_estimate,
    manifold,
    mean_of_units,
    prompt_agreement,
    seed_diversity,
    share,
    standardised,
)
from training.evaluation.measures import MotionMeasure, Preview, Space

Rows = Mapping[str, Mapping[str, Tensor]]
"""Of one method: name of a measure to its tensors, one row a sample, prompt by prompt."""
NEIGHBOURS = 5
"""Of the neighbourhoods of recall and coverage."""


@dataclass(frozen=True)
class Column:
    """What a number of a report is."""

    key: str
    label: str
    text: str
    better: Literal["lower", "higher", "near the teacher's"]
    units: str
    """What its interval is over."""
    style: str = ".4g"
    source: str = ""


@dataclass(frozen=True)
class Measurement:
    """A number of one method."""

    column: Column
    estimate: Estimate


@dataclass(frozen=True)
class Setting:
    """What all methods of a report share."""

    prompts: int
    seeds: int
    frames: int
    spaces: Sequence[Space]
    """The first is the main one: keys of its metrics have no suffix."""
    wanted: Tensor | None
    """Classes that each prompt names, (prompts, attributes); None without a classifier."""
    lpips: Callable[[Tensor, Tensor], Tensor] | None
    """Distances of pairs of pictures (pairs, 3, height, width) in [0, 1]."""
    data: Rows | None
    """Of real pictures or clips."""

    @property
    def groups(self) -> Tensor:
        """The prompt of each sample."""
        return torch.arange(self.prompts).repeat_interleave(self.seeds)

    @property
    def both_seeds(self) -> tuple[int, int]:
        """Samples of each prompt, of a method and of the reference."""
        return self.seeds, self.seeds

    def key(self, name: str, space: Space) -> str:
        """The key of a metric in a space."""
        return name if space is self.spaces[0] else f"{name}_{space.name}"


@dataclass(frozen=True)
class Metric:
    """One name of ``--metrics``."""

    text: str
    source: str
    measure: Callable[[Setting, Rows, Rows], list[Measurement]]
    """From the setting, a method's rows and those of the reference."""
    seeds: int = 1
    samples: int = 1
    frames: int = 1
    needs: Literal["classifier", "lpips", "data"] | None = None
    """At least so many of each, and what has to be there."""
    to_teacher: bool = False
    """Whether it compares with the reference."""


def inapplicable(metric: Metric, frames: int, has: Collection[str]) -> str | None:
    """Why a metric says nothing of such samples, None when it does. has: those of ``Metric.needs`` that are there."""
    if frames < metric.frames:
        return f"is for clips, these samples have {frames} frame"
    missing = {
        "classifier": "needs a classifier that knows the prompts: there is one for the embedded teacher's only",
        "lpips": "needs --lpips_weights BACKBONE HEADS",
        "data": "needs --data FOLDER",
    }
    return missing[metric.needs] if metric.needs and metric.needs not in has else None


def shortage(metric: Metric, prompts: int, seeds: int) -> str | None:
    """Of what there are too few samples for a metric, None when there are enough."""
    if seeds < metric.seeds:
        return f"needs at least {metric.seeds} seeds for each prompt, found {seeds}: raise --seeds"
    if prompts * seeds < metric.samples:
        return f"needs at least {metric.samples} samples, found {prompts * seeds}: raise --seeds or give more prompts"
    return None


def _frechet(setting: Setting, own: Rows, reference: Rows) -> list[Measurement]:
    return [
        Measurement(
            Column(
                setting.key("frechet", space),
                f"FD-{space.label} to the teacher",
                f"Frechet distance of {space.label} features to other samples of the many-step teacher",
                "lower",
                "samples",
            ),
            frechet_estimate(own[space.name]["features"], reference[space.name]["features"], setting.both_seeds),
        )
        for space in setting.spaces
    ]


def _kernel(setting: Setting, own: Rows, reference: Rows) -> list[Measurement]:
    return [
        Measurement(
            Column(
                setting.key("kernel", space),
                f"KD-{space.label} to the teacher",
                f"Kernel distance of {space.label} features to the same samples, without the bias of few samples",
                "lower",
                "samples",
            ),
            kernel_estimate(own[space.name]["features"], reference[space.name]["features"]),
        )
        for space in setting.spaces
    ]


def _coverage(setting: Setting, own: Rows, reference: Rows) -> list[Measurement]:
    found = []
    for space in setting.spaces:
        value = manifold(_layout(own, space), _layout(reference, space), NEIGHBOURS)
        for name, estimate, text in (
            ("recall", value.recall, "Share of the teacher's samples that lie among the method's"),
            ("coverage", value.coverage, "Share of the teacher's samples with one of the method's nearby"),
            ("precision", value.precision, "Share of the method's samples that lie among the teacher's"),
        ):
            text = f"{text} ({space.label} features, {NEIGHBOURS} neighbours)"
            column = Column(setting.key(name, space), f"{name} ({space.label})", text, "higher", "samples", ".1%")
            found.append(Measurement(column, estimate))
    return found


def _diversity(setting: Setting, own: Rows, reference: Rows) -> list[Measurement]:
    return [
        Measurement(
            Column(
                setting.key("diversity", space),
                "diversity" if space is setting.spaces[0] else f"diversity ({space.label})",
                f"Mean {'1 - cosine' if space.cosine else 'distance'} of {space.label} features between seeds of one "
                "prompt",
                "near the teacher's",
                "prompts",
            ),
            seed_diversity(
                _layout(own, space), setting.groups, cosine_distance if space.cosine else euclidean_distance, 4096
            ),
        )
        for space in setting.spaces
    ]


def _layout(rows: Rows, space: Space) -> Tensor:
    return rows[space.name].get("layout", rows[space.name]["features"])


def _lpips(setting: Setting, own: Rows, reference: Rows) -> list[Measurement]:
    frames = own[Preview.name]["frames"]
    middle, network = frames[:, frames.shape[1] // 2], setting.lpips
    assert network is not None
    text = "Mean LPIPS (AlexNet) between seeds of one prompt, of pictures or middle frames of at most 256 pixels"
    column = Column("lpips", "LPIPS diversity", text, "near the teacher's", "prompts")
    estimate = seed_diversity(middle, setting.groups, lambda a, b: network(a / 255, b / 255), 16)
    return [Measurement(column, estimate)]


def _agreement(setting: Setting, own: Rows, reference: Rows) -> list[Measurement]:
    assert setting.wanted is not None
    (seen,) = [own[space.name]["seen"] for space in setting.spaces if "seen" in own[space.name]]
    text = "Share of samples in which the classifier sees everything that the prompt names"
    column = Column("agreement", "prompt agreement", text, "higher", "samples", ".1%")
    return [Measurement(column, prompt_agreement(seen, setting.wanted[setting.groups]))]


def _motion(setting: Setting, own: Rows, reference: Rows) -> list[Measurement]:
    rows = own[MotionMeasure.name]
    flow = Column("flow", "optical flow", "Mean optical flow, pixels a frame", "near the teacher's", "samples")
    text = "Share of clips in which something moves fast"
    dynamic = Column("dynamic_degree", "dynamic degree", text, "near the teacher's", "samples", ".1%")
    text = "1 - mean error of frames interpolated from their neighbours along the flow"
    smooth = Column("smoothness", "smoothness", text, "higher", "samples")
    found = [
        Measurement(flow, mean_of_units(rows["flow"])),
        Measurement(dynamic, share(rows["dynamic"])),
    ]
    return found if setting.frames < 3 else [*found, Measurement(smooth, mean_of_units(rows["smoothness"]))]


def _clip_frechet(setting: Setting, own: Rows, reference: Rows) -> list[Measurement]:
    found = []
    for space in setting.spaces:
        clips = [
            torch.cat([rows[space.name]["clip"], rows[MotionMeasure.name]["statistics"]], dim=1)
            for rows in (reference, own)
        ]
        column = Column(
            setting.key("clip_frechet", space),
            f"FD-{space.label}+flow to the teacher",
            f"Frechet distance of clips: {space.label} features over time beside statistics of the optical flow, in "
            "units of the teacher's deviation",
            "lower",
            "samples",
        )
        far, near = standardised(*clips)
        found.append(Measurement(column, frechet_estimate(near, far, setting.both_seeds)))
    return found


def _data_frechet(setting: Setting, own: Rows, reference: Rows) -> list[Measurement]:
    data = setting.data
    assert data is not None
    return [
        Measurement(
            Column(
                setting.key("data_frechet", space),
                f"FD-{space.label} to the data",
                f"Frechet distance of {space.label} features to {len(data[space.name]['features'])} real samples",
                "lower",
                "samples",
            ),
            frechet_estimate(own[space.name]["features"], data[space.name]["features"], (setting.seeds, 1)),
        )
        for space in setting.spaces
    ]


_FRECHET = "Heusel et al. 2017, arXiv 1706.08500"
METRICS: dict[str, Metric] = {
    "frechet": Metric(
        "Frechet distance of features to the many-step teacher", _FRECHET, _frechet, samples=2, to_teacher=True
    ),
    "diversity": Metric(
        "how far apart seeds of one prompt are, in features", "Fan et al. 2025, arXiv 2510.27684", _diversity, seeds=2
    ),
    "agreement": Metric(
        "does a classifier see what the prompt says (embedded teacher)", "", _agreement, needs="classifier"
    ),
    "kernel": Metric(
        "kernel distance: like frechet, but unbiased for few samples",
        "Binkowski et al. 2018, arXiv 1801.01401",
        _kernel,
        samples=2,
        to_teacher=True,
    ),
    "coverage": Metric(
        "recall, coverage, precision: does it reach what the teacher reaches",
        "Kynkaanniemi et al. 2019, arXiv 1904.06991; Naeem et al. 2020, arXiv 2002.09797",
        _coverage,
        samples=NEIGHBOURS + 1,
        to_teacher=True,
    ),
    "lpips": Metric(
        "how far apart seeds of one prompt are, in LPIPS (with --lpips_weights)",
        "Zhang et al. 2018, arXiv 1801.03924",
        _lpips,
        seeds=2,
        needs="lpips",
    ),
    "motion": Metric(
        "clips: optical flow, dynamic degree, smoothness",
        "flow: Kroeger et al. 2016, arXiv 1603.03590; the others after VBench, arXiv 2311.17982",
        _motion,
        frames=2,
    ),
    "clip_frechet": Metric(
        "clips: Frechet distance of features over time beside motion",
        _FRECHET,
        _clip_frechet,
        samples=2,
        frames=2,
        to_teacher=True,
    ),
    "data_frechet": Metric(
        "Frechet distance to real pictures or clips (with --data)", _FRECHET, _data_frechet, samples=2, needs="data"
    ),
}
"""In the order of a report."""
MOVING = {"motion", "clip_frechet"}
"""Those that need optical flow."""
