"""What samples tell of trouble, compared with the teacher's own and with earlier ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

from training.config.sections import MonitoringSection
from training.monitoring.feature_statistics import FeatureStatistics
from training.monitoring.sample_statistics import SampleStatistics

Found = Iterator[tuple[str, str]]
"""(kind, text)"""
_COLOURS = "lower objective.guidance_scale or generator.lr, or, with a fake, raise fake_updates"
_DIVERSITY = "with a fake, raise fake_updates or fake.lr; lower generator.lr, or use an earlier checkpoint"

_CLIPPED_TIMES, _CLIPPED_MORE = 2.0, 0.005
"""Black or white values, as a share of all: how many times the teacher's, and how much more, is over-saturated."""


class SampleAlerts:
    """Looks at the validations of a run in their order."""

    def __init__(self, limits: MonitoringSection, last: str | None = None) -> None:
        self.limits, self.last = limits, last
        self._teacher: dict[str, tuple[SampleStatistics, FeatureStatistics | None]] = {}
        self._first: dict[str, SampleStatistics] = {}
        self._most_diverse = 0.0
        self._nearest = self._frechet = math.inf

    def teacher(self, phase: str, statistics: SampleStatistics, features: FeatureStatistics | None) -> None:
        """Take note of the teacher's samples as they look from the end of a phase."""
        self._teacher[phase] = statistics, features

    def validation(
        self, update: int, expert: str, statistics: SampleStatistics, features: FeatureStatistics | None
    ) -> Found:
        """Look at the samples of a validation."""
        yield from self._far_from_teacher(statistics)
        if features:
            yield from self._frechet_rises(features)
        if not update:
            return
        first = self._first.setdefault(expert, statistics)
        if statistics.diversity is not None:
            self._most_diverse = max(self._most_diverse, statistics.diversity)
            if statistics.diversity < self.limits.diversity_fall * self._most_diverse:
                yield (
                    "diversity",
                    f"samples of one prompt differ by {statistics.diversity:.3f}, it was {self._most_diverse:.3f}: "
                    f"seeds collapse onto one picture; {_DIVERSITY}",
                )
        for name in ("saturation", "contrast"):
            before, now = getattr(first, name), getattr(statistics, name)
            # Towards the teacher's is no trouble.
            of_teacher = getattr(self._teacher[expert][0], name) if expert in self._teacher else 0.0
            if now > max(self.limits.saturation_rise * before, of_teacher):
                yield (
                    name,
                    f"{name} rose from {before:.3f} to {now:.3f}, {statistics.clipped:.0%} of the values are black or "
                    f"white; {_COLOURS}",
                )
        if expert in self._teacher:
            yield from self._unlike_teacher(expert, statistics, features)

    def _far_from_teacher(self, statistics: SampleStatistics) -> Found:
        distance = statistics.teacher_distance
        if distance is None or not math.isfinite(distance):
            return
        self._nearest = min(self._nearest, distance)
        if distance > self.limits.teacher_distance_rise * self._nearest:
            yield (
                "teacher_distance",
                f"samples are {distance:.2f} away from the teacher's of the same prompts and noise, it was "
                f"{self._nearest:.2f} (1 is as far as samples of other prompts); look at both, lower generator.lr, or "
                "use an earlier checkpoint",
            )

    def _frechet_rises(self, features: FeatureStatistics) -> Found:
        self._frechet = min(self._frechet, features.frechet)
        if features.frechet > self.limits.frechet_rise * self._frechet:
            yield (
                "frechet",
                f"the Frechet distance to the teacher rose from {self._frechet:.3g} to {features.frechet:.3g}; lower "
                "generator.lr, or use an earlier checkpoint",
            )

    def _unlike_teacher(self, expert: str, own: SampleStatistics, features: FeatureStatistics | None) -> Found:
        """Above the teacher at any time; below it in the last phase, since samples of earlier ones are blurred."""
        teacher, of_features = self._teacher[expert]
        names = ("saturation", "contrast", "motion")
        for name in names:
            now, then = getattr(own, name), getattr(teacher, name)
            if now is not None and then is not None and now > self.limits.above_teacher * then:
                remedy = _COLOURS if name != "motion" else "look whether clips flicker; lower generator.lr"
                yield name, f"{name} is {now:.3f}, of the teacher's samples it is {then:.3f}; {remedy}"
        if own.clipped > _CLIPPED_TIMES * teacher.clipped + _CLIPPED_MORE:
            yield (
                "clipped",
                f"{own.clipped:.1%} of the values are black or white, of the teacher's samples {teacher.clipped:.1%}: "
                f"they are over-saturated; {_COLOURS}",
            )
        if expert != self.last:
            return
        pairs = [(name, getattr(own, name), getattr(teacher, name)) for name in (*names, "diversity")]
        if features and of_features:
            pairs.append(("feature_diversity", features.feature_diversity, of_features.feature_diversity))
        for name, now, then in pairs:
            if now is not None and then is not None and now < self.limits.below_teacher * then:
                remedy = (
                    _DIVERSITY if name.endswith("diversity") else "lower generator.lr, or use an earlier checkpoint"
                )
                yield f"low_{name}", f"{name} is {now:.3f}, of the teacher's samples it is {then:.3f}; {remedy}"
