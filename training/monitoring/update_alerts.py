"""What the numbers of updates tell of trouble: losses, gradient norms, the distance of scores, weights."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from statistics import median

from training.config.sections import MonitoringSection

Found = Iterator[tuple[str, str]]
"""(kind, text)"""
_BEGINNING, _RECENT = 3, 7
"""Updates of a phase whose median distance of scores is the first, and the latest that are compared with it."""


class UpdateAlerts:
    """Numbers of single updates are noisy: what is compared are medians.

    Losses and norms are compared as medians of blocks of ``window`` updates of one phase, and two in a row must be out
    of bounds; the fake's loss with the lower quartile of the blocks before. The distance of scores needs less, as it
    has a scale of its own: what it was at the beginning of the phase, where expert and fake are the teacher.
    """

    def __init__(self, limits: MonitoringSection) -> None:
        self.limits = limits
        self._expert = ""
        self._values: dict[str, list[float]] = {}
        self._blocks: dict[str, list[float]] = {}
        self._first: list[float] = []
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def _begin(self, expert: str) -> None:
        if expert != self._expert:
            self._expert, self._values, self._blocks, self._first = expert, {}, {}, []
            self._recent.clear()

    def replay(self, expert: str, values: Mapping[str, float]) -> None:
        """Take note of an update of before a resumption."""
        self._begin(expert)
        self._note_distance(values)

    def after_update(self, expert: str, values: Mapping[str, float]) -> Found:
        """Look at the numbers of an update."""
        self._begin(expert)
        for name in ("fake_loss", "generator_grad_norm", "fake_grad_norm"):
            if math.isfinite(value := values.get(name, math.nan)):
                self._values.setdefault(name, []).append(value)
        for name, recent in self._values.items():
            if len(recent) < self.limits.window:
                continue
            blocks = self._blocks.setdefault(name, [])
            blocks.append(median(recent))
            recent.clear()
            yield from self._fake_lags(blocks) if name == "fake_loss" else self._explodes(name, blocks)
        yield from self._scores_part(values)

    def _note_distance(self, values: Mapping[str, float]) -> bool:
        """Whether there is a new distance to compare."""
        value = values.get("score_distance", math.nan)
        if not math.isfinite(value):
            return False
        (self._first if len(self._first) < _BEGINNING else self._recent).append(value)
        return True

    def _scores_part(self, values: Mapping[str, float]) -> Found:
        if not self._note_distance(values) or len(self._recent) < _RECENT:
            return
        first, now = median(self._first), median(self._recent)
        if now > self.limits.score_distance_rise * first:
            yield (
                "score_distance",
                f"fake and teacher are {now:.3g} apart, it was {first:.3g} when the phase began: the samples leave "
                "what the teacher makes; lower generator.lr, or raise fake_updates",
            )

    def _fake_lags(self, losses: list[float]) -> Found:
        before = sorted(losses[:-2])
        if before and min(losses[-2:]) > self.limits.fake_loss_rise * before[len(before) // 4]:
            yield (
                "fake_lags",
                f"the fake's loss rose from {before[len(before) // 4]:.3g} to {losses[-1]:.3g}: it does not follow the "
                "expert any more, whose direction is then wrong; raise fake_updates or fake.lr, or lower generator.lr",
            )

    def _explodes(self, name: str, norms: list[float]) -> Found:
        if min(norms[-2:]) > self.limits.grad_norm_rise * norms[0]:
            role = name.removesuffix("_grad_norm")
            yield (
                f"{role}_gradient",
                f"the {role}'s gradient norm rose from {norms[0]:.3g} to {norms[-1]:.3g}; lower {role}.lr, or "
                f"{role}.max_grad_norm, and resume from a checkpoint before the rise",
            )

    def weight_drift(self, moved: float, changed: float, share: float) -> Found:
        """Look at how far weights moved in this share of the phase, and how many changed."""
        if changed < 0.5:
            yield (
                "lost_steps",
                f"only {changed:.0%} of the expert's weights changed: steps of generator.lr vanish in their precision; "
                "raise generator.lr or train in float32",
            )
        elif moved / share < self.limits.smallest_drift:
            yield (
                "small_steps",
                f"the expert's weights moved by {moved:.1e} of their size in {share:.0%} of the phase: the teacher "
                "will hardly change; raise generator.lr or updates",
            )
