"""A report of methods side by side: report.json for programs, report.md and pictures for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdmd_core.metrics import Estimate
from training.evaluation.measures import shrunk
from training.evaluation.pictures import animation, labelled_columns
from training.evaluation.quantities import Measurement, Quantity

HEADLINE = ("frechet", "diversity", "agreement", "flow")
"""Keys of the first table, where they were measured."""
_SEEDS_IN_OVERVIEW = 4
_SEEDS_OF_PROMPT = 8
_FRAMES_OF_STRIP = 6


@dataclass(frozen=True)
class Row:
    """One method."""

    method: str
    """Its name."""
    network_evaluations: int
    """Network evaluations for one sample, guidance counted as two."""
    seconds: float
    """The time that sampling took for all samples, whenever it was."""
    measurements: Sequence[Measurement]
    """Its numbers, the same ones in the same order for all methods."""

    def estimate(self, key: str) -> Estimate:
        """Look a number up.

        Raises:
            KeyError: When there is none of this key.
        """
        return {m.quantity.key: m.estimate for m in self.measurements}[key]


@dataclass(frozen=True)
class Report:
    """What was measured and how."""

    prompts: Sequence[str]
    """The prompts, each sampled with the same seeds by all methods."""
    seeds: int
    """The number of samples of each prompt."""
    features: str | None
    """What the main Frechet distance is called; None where nothing was measured in features."""
    rows: Sequence[Row]
    """The methods."""
    settings: Mapping[str, Any]
    """What a reader has to know of how the samples were made."""
    plans: Mapping[str, str] = field(default_factory=dict)
    """Method to its phase plan as text."""
    not_measured: Mapping[str, str] = field(default_factory=dict)
    """Metric to why it was left out."""
    floor: str | None = None
    """The row that says how far samples of the reference are from each other."""
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Method to the SHA-256 of each of its experts: which experts were measured."""

    @property
    def quantities(self) -> list[Quantity]:
        """What the numbers are, in their order."""
        return [measurement.quantity for measurement in self.rows[0].measurements]

    def to_dict(self) -> dict[str, Any]:
        """Convert to the JSON form: ``rows`` has the bare numbers, ``metrics`` what they are and their intervals."""
        return {
            "prompts": len(self.prompts),
            "seeds": self.seeds,
            "samples": len(self.prompts) * self.seeds,
            "features": self.features,
            "rows": [
                {"method": row.method, "network_evaluations": row.network_evaluations}
                | {m.quantity.key: _rounded(m.estimate.value) for m in row.measurements}
                | {"seconds": round(row.seconds, 2)}
                for row in self.rows
            ],
            "metrics": [
                {
                    "key": quantity.key,
                    "label": quantity.label,
                    "definition": quantity.text,
                    "better": quantity.better,
                    "source": quantity.source,
                    "interval_over": quantity.units,
                    "values": [_interval(row.method, row.estimate(quantity.key)) for row in self.rows],
                }
                for quantity in self.quantities
            ],
            "not_measured": dict(self.not_measured),
            "settings": dict(self.settings),
            "experts": {method: dict(hashes) for method, hashes in self.files.items()},
        }

    def write(self, folder: Path, pictures: Sequence[tuple[str, str]]) -> None:
        """Write report.json and report.md.

        Args:
            folder: Where they go, beside report.png.
            pictures: Caption and path relative to the folder of each further picture.
        """
        (folder / "report.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(self.to_markdown(pictures), encoding="utf-8")

    def to_markdown(self, pictures: Sequence[tuple[str, str]] = ()) -> str:
        """Convert to the report for people.

        Args:
            pictures: Caption and path relative to the report of each further picture.
        """
        parts = [
            "# Phase experts against their teacher",
            "![methods side by side, the same prompts and seeds](report.png)",
            self._headline(),
            self._samples(),
        ]
        if self.quantities:
            parts += ["## Every number with its 95 % interval", self._intervals(), self._definitions()]
        if any("corrected" in quantity.key for quantity in self.quantities):
            parts.append(
                "A raw Frechet distance, as it is usually reported, grows as samples get fewer: compare it at equal "
                "counts alone. The corrected one estimates what it is of many samples, and the interval is of that."
            )
        parts += [f"Not measured: {name} {reason}." for name, reason in self.not_measured.items()]
        if pictures:
            links = ", ".join(f"[{_cell(caption)}]({path})" for caption, path in pictures)
            parts += ["## Pictures", f"The same seeds of one prompt, methods side by side: {links}."]
        parts += ["## Settings", "\n".join(f"- {name}: {value}" for name, value in self.settings.items())]
        parts += [f"Phase plan of {name}:\n\n```text\n{plan}\n```" for name, plan in self.plans.items()]
        return "\n\n".join(parts) + "\n"

    def _headline(self) -> str:
        columns = [quantity for quantity in self.quantities if quantity.key in HEADLINE]
        head = ["method", "network evaluations", *(quantity.label for quantity in columns), "seconds"]
        lines = [
            [
                row.method,
                str(row.network_evaluations),
                *(format(row.estimate(quantity.key).value, quantity.style) for quantity in columns),
                f"{row.seconds:.1f}",
            ]
            for row in self.rows
        ]
        return _table(head, lines)

    def _samples(self) -> str:
        text = (
            f"{len(self.prompts) * self.seeds} samples a method: {_count(len(self.prompts), 'prompt')}, "
            f"{_count(self.seeds, 'seed')}, the same for all methods. Seconds are the time of sampling on the machine "
            "that sampled."
        )
        if self.floor and any(quantity.better == "lower" for quantity in self.quantities):
            text += f" The row of {self.floor} is the noise floor: the teacher against other samples of itself."
        return text

    def _intervals(self) -> str:
        head = ["metric", "better", *(row.method for row in self.rows), "interval over"]
        lines = []
        for quantity in self.quantities:
            estimates = [row.estimate(quantity.key) for row in self.rows]
            cells = [_cell_of(estimate, quantity.style) for estimate in estimates]
            counts = sorted({estimate.samples for estimate in estimates})
            over = f"{' or '.join(map(str, counts))} {quantity.units}"
            lines.append([quantity.label, quantity.better, *cells, over])
        return _table(head, lines)

    def _definitions(self) -> str:
        return "\n".join(
            f"- {quantity.label}: {quantity.text}{f' ({quantity.source})' if quantity.source else ''}."
            for quantity in self.quantities
        )


def write_pictures(
    folder: Path, prompts: Sequence[str], shown: Sequence[int], methods: Sequence[tuple[str, Tensor]]
) -> list[tuple[str, str]]:
    """Write report.png, and report/prompt-*.png with the seeds of each prompt; GIFs as well for clips.

    Args:
        folder: Where they go; pictures of an earlier report are removed.
        prompts: The prompts.
        shown: Indices of the prompts to show.
        methods: Title and 8-bit previews (prompts, seeds, frames, 3, height, width) of each method.

    Returns:
        Prompt and path relative to the folder of each picture in report/.
    """
    inside = folder / "report"
    inside.mkdir(parents=True, exist_ok=True)
    for old in inside.glob("prompt-*"):
        old.unlink()
    frames = methods[0][1].shape[2]
    overview = [(title, _small(previews[list(shown), :_SEEDS_IN_OVERVIEW], 128)) for title, previews in methods]
    labels = [prompts[index] for index in shown]
    pictures = [_sheet(overview, frame, labels, None) for frame in range(frames)]
    pictures[frames // 2].save(folder / "report.png")
    (folder / "report.gif").unlink(missing_ok=True)
    if frames > 1:
        animation(folder / "report.gif", pictures)
    written = []
    for index in shown:
        own = [(title, _small(previews[index, :_SEEDS_OF_PROMPT], 256)) for title, previews in methods]
        seeds = [f"seed {seed}" for seed in range(own[0][1].shape[0])]
        path = inside / f"prompt-{index:03d}.png"
        if frames == 1:
            _sheet([(title, s[:, None]) for title, s in own], 0, seeds, prompts[index]).save(path)
        else:
            at = torch.linspace(0, frames - 1, min(frames, _FRAMES_OF_STRIP)).round().long()
            strips = [(title, samples[:, at]) for title, samples in own]
            labelled_columns(strips, seeds, _zoom(strips), prompts[index]).save(path)
            moving = [
                _sheet([(t, s[:, None]) for t, s in own], frame, seeds, prompts[index]) for frame in range(frames)
            ]
            animation(path.with_suffix(".gif"), moving)
        written.append((prompts[index], path.relative_to(folder).as_posix()))
    return written


def _sheet(methods: Sequence[tuple[str, Tensor]], frame: int, rows: Sequence[str], heading: str | None) -> Any:
    """One frame of samples (rows, columns, frames, 3, height, width), methods side by side."""
    columns = [(title, samples[:, :, frame]) for title, samples in methods]
    return labelled_columns(columns, rows, _zoom(columns), heading)


def _zoom(columns: Sequence[tuple[str, Tensor]]) -> int:
    return 2 if min(columns[0][1].shape[-2:]) <= 96 else 1


def _small(previews: Tensor, side: int) -> Tensor:
    """8-bit pictures (..., 3, height, width) as pixels in [0, 1], at most this large on the shorter side."""
    pictures = previews.flatten(0, -4).float() / 255
    return shrunk(pictures, side).unflatten(0, previews.shape[:-3])


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _interval(method: str, estimate: Estimate) -> dict[str, Any]:
    numbers = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {"method": method, **{key: _rounded(value) for key, value in numbers.items()}, "count": estimate.samples}


def _cell_of(estimate: Estimate, style: str) -> str:
    value = format(estimate.value, style)
    if not math.isfinite(estimate.low):
        return value
    return f"{value} [{format(estimate.low, style)}, {format(estimate.high, style)}]"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in [head, rule, *lines])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
