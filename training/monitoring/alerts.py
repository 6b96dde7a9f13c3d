"""Early alerts of trouble in a run: what is wrong, and what to do, in a sentence, once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from training.config.sections import MonitoringSection
from training.monitoring.feature_statistics import FeatureStatistics
from training.monitoring.sample_alerts import SampleAlerts
from training.monitoring.sample_statistics import SampleStatistics
from training.monitoring.update_alerts import UpdateAlerts

BROKEN = "broken"
"""The kind of the alert that says not to go on."""
_TOGETHER = {"teacher_distance", "score_distance"}
"""Kinds that are trouble by themselves, and together show a run that has left its teacher."""


@dataclass(frozen=True)
class Alert:
    """Something to look after. kind: one word for each cause."""

    kind: str
    update: int
    expert: str
    text: str


class Alerts:
    """Looks at the updates and validations of a run in their order. Every kind is reported once in each phase.

    Args:
        limits: Beyond which numbers are trouble.
        last: The last expert of the plan, whose samples are not blurred by a jump to sigma 0.
        seen: (kind, expert) reported already.
    """

    def __init__(
        self, limits: MonitoringSection, last: str | None = None, seen: Iterable[tuple[str, str]] = ()
    ) -> None:
        self.limits = limits
        self._seen = set(seen)
        self._updates, self._samples = UpdateAlerts(limits), SampleAlerts(limits, last)

    def teacher(self, phase: str, statistics: SampleStatistics, features: FeatureStatistics | None = None) -> None:
        """Compare validations of a phase with these numbers of the teacher's samples from now on."""
        self._samples.teacher(phase, statistics, features)

    def replay(self, expert: str, values: Mapping[str, float]) -> None:
        """An update of before a resumption: what the phase began with."""
        self._updates.replay(expert, values)

    def after_update(self, update: int, expert: str, values: Mapping[str, float]) -> list[Alert]:
        """values: fake_loss, score_distance and gradient norms of this update; NaN and Inf do not count."""
        return self._new(update, expert, self._updates.after_update(expert, values))

    def weight_drift(self, update: int, expert: str, moved: float, changed: float, share: float) -> list[Alert]:
        """Of the weights since the phase began: relative length of the way, share of weights that changed at all.

        share: how much of the phase is done.
        """
        return self._new(update, expert, self._updates.weight_drift(moved, changed, share))

    def validation(
        self, update: int, expert: str, statistics: SampleStatistics, features: FeatureStatistics | None = None
    ) -> list[Alert]:
        """Samples of the fixed prompts and seeds; those before the first update are of an expert that is none yet."""
        return self._new(update, expert, self._samples.validation(update, expert, statistics, features))

    def _new(self, update: int, expert: str, found: Iterable[tuple[str, str]]) -> list[Alert]:
        new = [Alert(kind, update, expert, text) for kind, text in found if (kind, expert) not in self._seen]
        self._seen |= {(alert.kind, expert) for alert in new}
        if new and (BROKEN, expert) not in self._seen and all((kind, expert) in self._seen for kind in _TOGETHER):
            self._seen.add((BROKEN, expert))
            text = (
                "the run is broken: samples are far from the teacher's own, and the fake from the teacher, and they do "
                "not come back by themselves; stop it, and go on from a checkpoint before with a lower generator.lr, "
                "or begin again with that"
            )
            new.append(Alert(BROKEN, update, expert, text))
        return new
