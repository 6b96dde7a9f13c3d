"""Early alerts of trouble in a run: what is wrong, and what to do, in a sentence, once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median

from training.config.sections import MonitoringSection
from training.monitoring.sample_statistics import SampleStatistics


@dataclass(frozen=True)
class Alert:
    """Something to look after. kind: one word for each cause."""

    kind: str
    update: int
    expert: str
    text: str


class Alerts:
    """Looks at the updates and validations of a run in their order. Every kind is reported once in each phase.

    Numbers of single updates are noisy: what is compared are medians of blocks of ``window`` updates of one phase, and
    two in a row must be out of bounds. The fake's loss is compared with the lower quartile of the blocks before.
    """

    def __init__(self, limits: MonitoringSection, seen: Iterable[tuple[str, str]] = ()) -> None:
        self.limits = limits
        self._seen = set(seen)
        """(kind, expert) reported already."""
        self._expert = ""
        self._values: dict[str, list[float]] = {}
        self._blocks: dict[str, list[float]] = {}
        self._first: dict[str, SampleStatistics] = {}
        self._most_diverse = 0.0

    def after_update(self, update: int, expert: str, values: dict[str, float]) -> list[Alert]:
        """values: fake_loss, generator_grad_norm, fake_grad_norm of this update; NaN and Inf do not count."""
        if expert != self._expert:
            self._expert, self._values, self._blocks = expert, {}, {}
        for name in ("fake_loss", "generator_grad_norm", "fake_grad_norm"):
            if math.isfinite(value := values.get(name, math.nan)):
                self._values.setdefault(name, []).append(value)
        found: list[tuple[str, str]] = []
        for name, recent in self._values.items():
            if len(recent) < self.limits.window:
                continue
            blocks = self._blocks.setdefault(name, [])
            blocks.append(median(recent))
            recent.clear()
            found += self._fake_lags(blocks) if name == "fake_loss" else self._explodes(name, blocks)
        return self._new(update, expert, found)

    def _fake_lags(self, losses: list[float]) -> Iterator[tuple[str, str]]:
        before = sorted(losses[:-2])
        if before and min(losses[-2:]) > self.limits.fake_loss_rise * before[len(before) // 4]:
            yield (
                "fake_lags",
                f"the fake's loss rose from {before[len(before) // 4]:.3g} to {losses[-1]:.3g}: it does not follow the "
                "expert any more, whose direction is then wrong; raise fake_updates or fake.lr, or lower generator.lr",
            )

    def _explodes(self, name: str, norms: list[float]) -> Iterator[tuple[str, str]]:
        if min(norms[-2:]) > self.limits.grad_norm_rise * norms[0]:
            role = name.removesuffix("_grad_norm")
            yield (
                f"{role}_gradient",
                f"the {role}'s gradient norm rose from {norms[0]:.3g} to {norms[-1]:.3g}; lower {role}.lr, or "
                f"{role}.max_grad_norm, and resume from a checkpoint before the rise",
            )

    def weight_drift(self, update: int, expert: str, moved: float, changed: float, share: float) -> list[Alert]:
        """Of the weights since the phase began: relative length of the way, share of weights that changed at all.

        share: how much of the phase is done.
        """
        found: list[tuple[str, str]] = []
        if changed < 0.5:
            found.append(
                (
                    "lost_steps",
                    f"only {changed:.0%} of the expert's weights changed: steps of generator.lr vanish in their "
                    "precision; raise generator.lr or train in float32",
                )
            )
        elif moved / share < self.limits.smallest_drift:
            found.append(
                (
                    "small_steps",
                    f"the expert's weights moved by {moved:.1e} of their size in {share:.0%} of the phase: the teacher "
                    "will hardly change; raise generator.lr or updates",
                )
            )
        return self._new(update, expert, found)

    def validation(self, update: int, expert: str, statistics: SampleStatistics) -> list[Alert]:
        """Samples of the fixed prompts and seeds; those before the first update are of an expert that is none yet."""
        if not update:
            return []
        first = self._first.setdefault(expert, statistics)
        found: list[tuple[str, str]] = []
        if statistics.diversity is not None:
            self._most_diverse = max(self._most_diverse, statistics.diversity)
            if statistics.diversity < self.limits.diversity_fall * self._most_diverse:
                found.append(
                    (
                        "diversity",
                        f"samples of one prompt differ by {statistics.diversity:.3f}, it was {self._most_diverse:.3f}: "
                        "seeds collapse onto one picture; raise fake_updates or fake.lr, lower generator.lr, or use an "
                        "earlier checkpoint",
                    )
                )
        for name in ("saturation", "contrast"):
            before, now = getattr(first, name), getattr(statistics, name)
            if now > self.limits.saturation_rise * before:
                found.append(
                    (
                        name,
                        f"{name} rose from {before:.3f} to {now:.3f}, {statistics.clipped:.0%} of the values are black "
                        "or white; lower objective.guidance_scale or generator.lr, or raise fake_updates",
                    )
                )
        return self._new(update, expert, found)

    def _new(self, update: int, expert: str, found: Iterable[tuple[str, str]]) -> list[Alert]:
        new = [Alert(kind, update, expert, text) for kind, text in found if (kind, expert) not in self._seen]
        self._seen |= {(alert.kind, expert) for alert in new}
        return new
