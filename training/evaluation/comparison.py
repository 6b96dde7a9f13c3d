"""Metrics by name: from what was measured of a method's samples, and of the reference, to numbers with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pdmd_core.metrics import (
    CorrectedEstimate,
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
from training.evaluation.measures import FeatureSpace, MotionMeasure, Preview, RewardMeasure
from training.evaluation.quantities import Measurement, Metric, Quantity, Rows, Setting
from training.monitoring.bars import progress_bar

NEIGHBOURS = 5
"""Neighbours that make a neighbourhood of recall and coverage."""


def _raw_and_corrected(quantity: Quantity, corrected_key: str, found: CorrectedEstimate) -> list[Measurement]:
    """A distance as it is, and beside it without the bias of few samples; the interval is of the second."""
    corrected = replace(
        quantity,
        key=corrected_key,
        label=f"{quantity.label}, corrected",
        text=f"{quantity.label} without the bias of few samples: twice the raw distance less the median of resamples",
    )
    raw = replace(quantity, text=f"{quantity.text}, raw: too large by the bias of few samples")
    return [
        Measurement(raw, Estimate(found.raw, math.nan, math.nan, found.corrected.samples)),
        Measurement(corrected, found.corrected),
    ]


def _frechet(setting: Setting, own: Rows, reference: Rows) -> list[Measurement]:
    measured = []
    for space in setting.spaces:
        quantity = Quantity(
            setting.key("frechet", space),
            f"FD-{space.label} to the teacher",
            f"Frechet distance of {space.label} features to other samples of the many-step teacher",
            "lower",
            "samples",
        )
        pair = own[space.name]["features"], reference[space.name]["features"]
        found = frechet_estimate(*pair, setting.both_seeds)
        measured += _raw_and_corrected(quantity, setting.key("frechet_corrected", space), found)
    return measured


def _kernel(setting: Setting, own: Rows, reference: Rows) -> list[Measurement]:
    return [
        Measurement(
            Quantity(
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
            quantity = Quantity(setting.key(name, space), f"{name} ({space.label})", text, "higher", "samples", ".1%")
            found.append(Measurement(quantity, estimate))
    return found


def _diversity(setting: Setting, own: Rows, reference: Rows) -> list[Measurement]:
    return [
        Measurement(
            Quantity(
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


def _layout(rows: Rows, space: FeatureSpace) -> Tensor:
    return rows[space.name].get("layout", rows[space.name]["features"])


def _lpips(setting: Setting, own: Rows, reference: Rows) -> list[Measurement]:
    frames = own[Preview.name]["frames"]
    middle, network = frames[:, frames.shape[1] // 2], setting.lpips
    assert network is not None
    text = "Mean LPIPS (AlexNet) between seeds of one prompt, of pictures or middle frames of at most 256 pixels"
    quantity = Quantity("lpips", "LPIPS diversity", text, "near the teacher's", "prompts")
    estimate = seed_diversity(middle, setting.groups, lambda a, b: network(a / 255, b / 255), 16)
    return [Measurement(quantity, estimate)]


def _agreement(setting: Setting, own: Rows, reference: Rows) -> list[Measurement]:
    assert setting.wanted is not None
    (seen,) = [own[space.name]["seen"] for space in setting.spaces if "seen" in own[space.name]]
    text = "Share of samples in which the classifier sees everything that the prompt names"
    quantity = Quantity("agreement", "prompt agreement", text, "higher", "samples", ".1%")
    return [Measurement(quantity, prompt_agreement(seen, setting.wanted[setting.groups]))]


def _image_reward(setting: Setting, own: Rows, reference: Rows) -> list[Measurement]:
    text = "Mean reward by ImageReward, which predicts what people prefer for a prompt; the mean of its data is 0"
    quantity = Quantity("image_reward", "ImageReward", text, "higher", "samples", ".3f")
    return [Measurement(quantity, mean_of_units(own[RewardMeasure.name]["reward"]))]


def _motion(setting: Setting, own: Rows, reference: Rows) -> list[Measurement]:
    rows = own[MotionMeasure.name]
    flow = Quantity("flow", "optical flow", "Mean optical flow, pixels a frame", "near the teacher's", "samples")
    text = "Share of clips in which something moves fast"
    dynamic = Quantity("dynamic_degree", "dynamic degree", text, "near the teacher's", "samples", ".1%")
    text = "1 - mean error of frames interpolated from their neighbours along the flow"
    smooth = Quantity("smoothness", "smoothness", text, "higher", "samples")
    found = [
        Measurement(flow, mean_of_units(rows["flow"])),
        Measurement(dynamic, share(rows["dynamic"])),
    ]
    return found if setting.frames < 3 else [*found, Measurement(smooth, mean_of_units(rows["smoothness"]))]


def _clip_frechet(setting: Setting, own: Rows, reference: Rows) -> list[Measurement]:
    measured = []
    for space in setting.spaces:
        clips = [
            torch.cat([rows[space.name]["clip"], rows[MotionMeasure.name]["statistics"]], dim=1)
            for rows in (reference, own)
        ]
        quantity = Quantity(
            setting.key("clip_frechet", space),
            f"FD-{space.label}+flow to the teacher",
            f"Frechet distance of clips: {space.label} features over time beside statistics of the optical flow, in "
            "units of the teacher's deviation",
            "lower",
            "samples",
        )
        far, near = standardised(*clips)
        found = frechet_estimate(near, far, setting.both_seeds)
        measured += _raw_and_corrected(quantity, setting.key("clip_frechet_corrected", space), found)
    return measured


def _data_frechet(setting: Setting, own: Rows, reference: Rows) -> list[Measurement]:
    data, measured = setting.data, []
    assert data is not None
    for space in setting.spaces:
        real = data[space.name]["features"]
        quantity = Quantity(
            setting.key("data_frechet", space),
            f"FD-{space.label} to the data",
            f"Frechet distance of {space.label} features to {len(real)} real samples",
            "lower",
            "samples",
        )
        found = frechet_estimate(own[space.name]["features"], real, (setting.seeds, 1))
        measured += _raw_and_corrected(quantity, setting.key("data_frechet_corrected", space), found)
    return measured


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
        in_features=False,
    ),
    "image_reward": Metric(
        "what people would prefer for the prompt (with --image_reward)",
        "Xu et al. 2023, arXiv 2304.05977",
        _image_reward,
        samples=2,
        needs="image_reward",
        in_features=False,
    ),
    "motion": Metric(
        "clips: optical flow, dynamic degree, smoothness",
        "flow: Kroeger et al. 2016, arXiv 1603.03590; the others after VBench, arXiv 2311.17982",
        _motion,
        frames=2,
        in_features=False,
        of_motion=True,
    ),
    "clip_frechet": Metric(
        "clips: Frechet distance of features over time beside motion",
        _FRECHET,
        _clip_frechet,
        samples=2,
        frames=2,
        to_teacher=True,
        of_motion=True,
    ),
    "data_frechet": Metric(
        "Frechet distance to real pictures or clips (with --data)", _FRECHET, _data_frechet, samples=2, needs="data"
    ),
}
"""All metrics by name, in the order of a report."""


def compare(
    setting: Setting, names: Sequence[str], methods: Sequence[tuple[str, Rows]], reference: Rows
) -> dict[str, list[Measurement]]:
    """Compute metrics of methods.

    Args:
        setting: What all methods share.
        names: The metrics.
        methods: Name and rows of each method.
        reference: Rows of the reference; empty where no metric compares with it.

    Returns:
        Name of the method to its measurements, in the order of the metrics.
    """
    found: dict[str, list[Measurement]] = {method: [] for method, _ in methods}
    with progress_bar(total=len(names) * len(methods), desc="metrics", leave=False) as bar:  # bootstraps take time
        for name in names:
            for method, rows in methods:
                metric = METRICS[name]
                for own in metric.measure(setting, rows, reference):
                    found[method].append(replace(own, quantity=replace(own.quantity, source=metric.source)))
                bar.update()
    return found
