"""Alerts of trouble: each from a sequence that has it, none from sequences that are well."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from training.config.sections import MonitoringSection
from training.monitoring.alerts import Alert, Alerts
from training.monitoring.feature_statistics import FeatureStatistics
from training.monitoring.sample_statistics import SampleStatistics

DEMO = Path(__file__).parent / "healthy_demo.json"
"""A run of 60 updates a phase on the embedded teacher: every tenth update, and what every validation showed."""
WELL = SampleStatistics(diversity=0.12, saturation=0.38, contrast=0.11, clipped=0.01)


def told(alerts: Alerts, name: str, values: list[float], expert: str = "high_noise") -> list[Alert]:
    return [alert for i, value in enumerate(values) for alert in alerts.after_update(i + 1, expert, {name: value})]


def noisy(level: float, count: int, seed: int = 0) -> list[float]:
    """As loud as losses are."""
    numbers = random.Random(seed)
    return [level * math.exp(numbers.gauss(0, 0.3)) for _ in range(count)]


@pytest.mark.parametrize(
    ("name", "kind", "rise", "remedy"),
    [
        ("fake_loss", "fake_lags", 2, "raise fake_updates"),
        ("generator_grad_norm", "generator_gradient", 20, "lower generator.lr"),
        ("fake_grad_norm", "fake_gradient", 20, "lower fake.lr"),
    ],
)
def test_a_rise_is_reported_once_with_what_to_do(name: str, kind: str, rise: float, remedy: str) -> None:
    (alert,) = told(Alerts(MonitoringSection()), name, noisy(1.0, 60) + noisy(rise, 60, 1))
    assert alert.kind == kind and alert.expert == "high_noise" and remedy in alert.text
    assert alert.update == 100, "two blocks after it began"
    assert not told(Alerts(MonitoringSection()), name, noisy(1.0, 60) + noisy(1.2, 60, 1)), "as loud as they are"


@pytest.mark.parametrize("name", ["fake_loss", "generator_grad_norm"])
def test_a_single_outlier_and_a_nan_are_no_rise(name: str) -> None:
    values = noisy(1.0, 200)
    values[50], values[90], values[130] = 1e6, math.nan, math.inf
    assert not told(Alerts(MonitoringSection()), name, values)


def test_phases_are_compared_with_themselves_and_report_for_themselves() -> None:
    alerts = Alerts(MonitoringSection())
    assert not told(alerts, "fake_loss", noisy(0.4, 60), "high_noise")
    assert not told(alerts, "fake_loss", noisy(60.0, 60), "low_noise"), "another phase has another scale"
    assert len(told(alerts, "fake_loss", noisy(60.0, 60) + noisy(150.0, 60), "third")) == 1
    assert len(told(alerts, "fake_loss", noisy(60.0, 60) + noisy(150.0, 60), "fourth")) == 1


def test_what_was_reported_before_a_resumption_is_not_reported_again() -> None:
    rising = noisy(1.0, 40) + noisy(3.0, 40)
    assert told(Alerts(MonitoringSection()), "fake_loss", rising)
    assert not told(Alerts(MonitoringSection(), seen=[("fake_lags", "high_noise")]), "fake_loss", rising)


def test_seeds_that_collapse_are_reported() -> None:
    alerts = Alerts(MonitoringSection())
    assert not alerts.validation(20, "high_noise", WELL)
    assert not alerts.validation(40, "high_noise", replace(WELL, diversity=0.15))
    assert not alerts.validation(60, "low_noise", replace(WELL, diversity=0.10))
    (alert,) = alerts.validation(80, "low_noise", replace(WELL, diversity=0.08))
    assert alert.kind == "diversity" and "0.080" in alert.text and "0.150" in alert.text
    assert not alerts.validation(100, "low_noise", replace(WELL, diversity=0.01)), "once"
    assert not Alerts(MonitoringSection()).validation(20, "high_noise", replace(WELL, diversity=None)), (
        "one seed has none"
    )


@pytest.mark.parametrize("name", ["saturation", "contrast"])
def test_a_rise_of_saturation_or_contrast_is_reported(name: str) -> None:
    alerts = Alerts(MonitoringSection())
    before = getattr(WELL, name)
    assert not alerts.validation(20, "high_noise", WELL)
    assert not alerts.validation(40, "high_noise", replace(WELL, **{name: 1.4 * before}))
    (alert,) = alerts.validation(60, "high_noise", replace(WELL, **{name: 1.6 * before, "clipped": 0.4}))
    assert alert.kind == name and "40% of the values" in alert.text and "guidance_scale" in alert.text
    assert not alerts.validation(80, "low_noise", replace(WELL, **{name: 1.6 * before})), "phases differ"
    alerts = Alerts(MonitoringSection())
    alerts.teacher("high_noise", WELL)
    assert not alerts.validation(20, "high_noise", replace(WELL, **{name: 0.4 * before}))
    assert not alerts.validation(40, "high_noise", replace(WELL, **{name: 0.9 * before})), "towards the teacher's"


def test_weights_that_do_not_move_are_reported() -> None:
    alerts = Alerts(MonitoringSection())
    assert not alerts.weight_drift(20, "high_noise", moved=1e-3, changed=1.0, share=0.2)
    (small,) = alerts.weight_drift(40, "high_noise", moved=1e-5, changed=1.0, share=0.5)
    assert small.kind == "small_steps" and "raise generator.lr" in small.text
    assert not alerts.weight_drift(20, "low_noise", moved=4e-5, changed=1.0, share=0.2), "2e-4 at the end of the phase"
    (lost,) = alerts.weight_drift(40, "low_noise", moved=1e-3, changed=0.01, share=0.5)
    assert lost.kind == "lost_steps" and "1% of" in lost.text


def test_nothing_is_wrong_with_the_demo() -> None:
    run, alerts = json.loads(DEMO.read_text(encoding="utf-8")), Alerts(MonitoringSection(window=3))
    assert len(run["updates"]) == 13 and len(run["validations"]) == 8
    for values in run["updates"]:
        assert not alerts.after_update(values.pop("update"), values.pop("expert"), values)
    for line in run["validations"]:
        update, expert = line.pop("update"), line.pop("expert")
        assert not alerts.validation(update, expert, SampleStatistics(**line))


def test_no_false_alarm_in_many_healthy_runs() -> None:
    """Loud constant losses over 2,000 updates, a hundred times."""
    for seed in range(100):
        assert not told(Alerts(MonitoringSection()), "fake_loss", noisy(1.0, 2000, seed))


LIKE_TEACHER = replace(WELL, teacher_distance=0.2, motion=0.1)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("saturation", {"saturation": 1.3 * 0.38}),
        ("contrast", {"contrast": 1.3 * 0.11}),
        ("motion", {"motion": 0.13}),
        ("clipped", {"clipped": 0.03}),
        ("low_saturation", {"saturation": 0.5 * 0.38}),
        ("low_contrast", {"contrast": 0.05}),
        ("low_motion", {"motion": 0.05}),
        ("low_diversity", {"diversity": 0.07}),
    ],
)
def test_samples_unlike_the_teacher_s_are_reported_from_the_first_on(kind: str, changes: dict[str, float]) -> None:
    """Below the teacher only in the last phase: samples of earlier ones are blurred."""
    for expert, found in (("high_noise", not kind.startswith("low_")), ("low_noise", True)):
        alerts = Alerts(MonitoringSection(), last="low_noise")
        alerts.teacher(expert, LIKE_TEACHER)
        assert not alerts.validation(0, expert, replace(LIKE_TEACHER, **changes)), "the expert is none yet"
        assert not alerts.validation(10, expert, replace(LIKE_TEACHER, saturation=0.36, diversity=0.1))
        alerts = Alerts(MonitoringSection(), last="low_noise")
        alerts.teacher(expert, LIKE_TEACHER)
        assert [alert.kind for alert in alerts.validation(10, expert, replace(LIKE_TEACHER, **changes))] == [
            kind
        ] * found


def test_samples_and_scores_that_both_leave_the_teacher_are_a_broken_run() -> None:
    alerts = Alerts(MonitoringSection())
    assert not alerts.validation(0, "high_noise", replace(WELL, teacher_distance=0.3))
    assert not told(alerts, "score_distance", [1.0] * 10)
    (scores,) = told(alerts, "score_distance", [1.6] * 7)
    assert scores.kind == "score_distance" and "fake and teacher are 1.6 apart, it was 1" in scores.text
    assert not alerts.validation(10, "high_noise", replace(WELL, teacher_distance=0.44))
    distance, broken = alerts.validation(20, "high_noise", replace(WELL, teacher_distance=0.46))
    assert distance.kind == "teacher_distance" and broken.kind == "broken" and "stop it" in broken.text
    assert not alerts.validation(30, "high_noise", replace(WELL, teacher_distance=0.46)), "once"


def test_what_a_phase_began_with_is_known_after_a_resumption() -> None:
    alerts = Alerts(MonitoringSection())
    for value in (1.0, 1.0, 1.0):
        alerts.replay("high_noise", {"score_distance": value})
    assert [alert.kind for alert in told(alerts, "score_distance", [1.6] * 7)] == ["score_distance"]


def test_a_frechet_distance_that_rises_and_features_that_collapse_are_reported() -> None:
    alerts = Alerts(MonitoringSection(), last="low_noise")
    alerts.teacher("low_noise", WELL, FeatureStatistics(0.0, 50.0))
    assert not alerts.validation(10, "low_noise", WELL, FeatureStatistics(0.5, 45.0))
    assert not alerts.validation(20, "low_noise", WELL, FeatureStatistics(0.9, 40.0))
    found = alerts.validation(30, "low_noise", WELL, FeatureStatistics(1.1, 20.0))
    assert [alert.kind for alert in found] == ["frechet", "low_feature_diversity"]


RECORDED = Path(__file__).parent / "recorded_runs.json"
"""What benchmarks/cost/early_warnings.py recorded: runs of the demo with seeds other than those of the thresholds."""


def called(run: dict[str, Any]) -> dict[str, int]:
    """Kind of alert to the update at which a recorded run first had it."""
    alerts = Alerts(MonitoringSection(), last="low_noise")
    for phase, numbers in run["teacher"].items():
        alerts.teacher(phase, SampleStatistics(**numbers))
    found: list[Alert] = []
    names = ("score_distance", "fake_loss", "generator_grad_norm", "fake_grad_norm")
    shown = list(run["validations"])
    for update in range(len(run["experts"]) + 1):
        if update:
            values = {name: run[name][update - 1] for name in names}
            found += alerts.after_update(update, run["experts"][update - 1], values)
        while shown and shown[0]["update"] == update:
            line = shown.pop(0)
            numbers = {key: value for key, value in line.items() if key not in ("update", "expert", "name")}
            numbers.setdefault("diversity", None)
            found += alerts.validation(update, line["expert"], SampleStatistics(**numbers))
    return {alert.kind: alert.update for alert in reversed(found)}


def test_broken_runs_are_called_so_within_20_updates_and_healthy_ones_are_not() -> None:
    runs = {run["name"]: called(run) for run in json.loads(RECORDED.read_text(encoding="utf-8"))}
    for name in ("broken, generator.lr 0.03", "broken, generator.lr 0.1"):
        assert runs[name]["broken"] <= 20
    for name in ("over-saturated, batch 4", "over-saturated, batch 1"):
        assert {"contrast", "saturation", "clipped"} & set(runs[name]) and "broken" not in runs[name]
    healthy = {name: found for name, found in runs.items() if name.startswith("healthy")}
    assert len(healthy) == 10 and not any(healthy.values()), healthy
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    for name, found in runs.items():
        cell = ", ".join(f"`{kind}` {update}" for kind, update in sorted(found.items(), key=lambda item: item[::-1]))
        assert f"| {cell or 'none'} |" in page, name
