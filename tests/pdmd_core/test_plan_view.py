"""A plan as people see it: the text table and the plot."""

import io

import pytest
from hypothesis import given

from pdmd_core.phases import PhasePlan
from tests.helpers.phase_plans import plans


@given(plans())
def test_describe_has_one_line_for_each_step_with_its_expert_and_sigma(plan):
    header, *lines, summary = plan.describe().splitlines()
    assert header.split() == ["step", "expert", "sigma", "next", "raw", "time", "SNR", "log-SNR"]
    expected = [(phase.name, sigma) for phase in plan.phases for sigma in phase.sigmas]
    following = [*plan.sigmas[1:], 0.0]
    assert len(lines) == len(expected)
    for step, (line, (name, sigma), after) in enumerate(zip(lines, expected, following, strict=True)):
        assert line.split()[:4] == [str(step), name, f"{sigma:.5f}", f"{after:.5f}"]
    assert f"{len(plan)} phase(s), {len(expected)} step(s)" in summary


def test_describe_tells_the_shift_and_raw_times():
    lines = PhasePlan.from_steps([2, 2], shift=5.0).describe().splitlines()
    assert lines[-1].endswith("raw time at shift 5")
    assert [line.split()[4] for line in lines[1:-1]] == ["1.0000", "0.7500", "0.5000", "0.2500"]
    assert [line.split()[6] for line in lines[1:-1]] == ["-inf", "-5.416", "-3.219", "-1.022"]


def test_describe_says_when_no_shift_fits():
    lines = PhasePlan.from_sigmas([[1.0, 0.9], [0.75, 0.4]]).describe().splitlines()
    assert lines[-1].endswith("no single shift makes these steps uniform")
    assert all(line.split()[4] == "-" for line in lines[1:-1])


def test_plot_names_every_expert_at_its_place_and_every_sigma():
    plan = PhasePlan.from_steps([1, 2, 1], shift=3.0, names=["first", "second", "third"])
    figure = plan.plot()
    axes = figure.axes[0]
    texts = {text.get_text(): text.get_position()[0] for text in axes.texts}
    for k, phase in enumerate(plan.phases):
        assert texts[phase.name] == pytest.approx(sum(plan.interval(k)) / 2)
    for sigma in plan.sigmas:
        assert texts[f"{sigma:.4g}"] == sigma
    assert list(axes.lines[0].get_xdata()) == list(plan.sigmas)
    figure.savefig(picture := io.BytesIO(), format="png")
    assert picture.getvalue().startswith(b"\x89PNG")
