"""What is not a plan, or is asked of a plan that has no answer."""

import math

import numpy as np
import pytest

from pdmd_core.phases import Phase, PhasePlan, PhasePlanError


def phase(**changes):
    return {"name": "a", "sigmas": [1.0], **changes}


BAD_PLANS = {
    "no phases": (lambda: PhasePlan(()), ["at least one", "none"]),
    "no phases in sigmas": (lambda: PhasePlan.from_sigmas([]), ["at least one", "none"]),
    "capital name": (lambda: PhasePlan.from_sigmas([[1.0]], ["High"]), ["lower-case", "'High'"]),
    "empty name": (lambda: PhasePlan.from_sigmas([[1.0]], [""]), ["1 to 64", "''"]),
    "long name": (lambda: PhasePlan.from_sigmas([[1.0]], ["a" * 65]), ["1 to 64", "a" * 65]),
    "path as name": (lambda: PhasePlan.from_sigmas([[1.0]], ["../a"]), ["lower-case", "'../a'"]),
    "newline in name": (lambda: PhasePlan.from_sigmas([[1.0]], ["a\nb"]), ["lower-case", r"'a\nb'"]),
    "newline after name": (lambda: PhasePlan.from_sigmas([[1.0]], ["a\n"]), ["lower-case", r"'a\n'"]),
    "number as name": (lambda: PhasePlan.from_dict({"phases": [phase(name=3)]}), ["lower-case", "found 3"]),
    "empty phase": (lambda: PhasePlan.from_sigmas([[1.0], []]), ["'low_noise'", "no sigmas", "at least one step"]),
    "same name twice": (lambda: PhasePlan.from_sigmas([[1.0], [0.5]], ["a", "a"]), ["must differ", "a, a"]),
    "too few names": (lambda: PhasePlan.from_sigmas([[1.0], [0.5]], ["a"]), ["2 phases", "found 1"]),
    "too many names": (lambda: PhasePlan.from_sigmas([[1.0]], ["a", "b"]), ["1 phases", "found 2"]),
    "timestep as sigma": (lambda: PhasePlan.from_sigmas([[1000.0, 900.0]]), ["(0, 1]", "1000.0", "timesteps"]),
    "sigma zero": (lambda: PhasePlan.from_sigmas([[1.0, 0.0]]), ["(0, 1]", "0.0"]),
    "negative sigma": (lambda: PhasePlan.from_sigmas([[1.0, -0.5]]), ["(0, 1]", "-0.5"]),
    "nan": (lambda: PhasePlan.from_sigmas([[1.0, math.nan]]), ["(0, 1]", "nan"]),
    "truth value as sigma": (lambda: PhasePlan((Phase("a", (True,)),)), ["(0, 1]", "True"]),
    "text as sigma": (lambda: PhasePlan((Phase("a", ("1",)),)), ["(0, 1]", "'1'"]),
    "first is not one": (lambda: PhasePlan.from_sigmas([[0.9, 0.5]]), ["first sigma is 1", "0.9"]),
    "ascending": (lambda: PhasePlan.from_sigmas([[1.0, 0.5], [0.75]]), ["descend", "0.5", "0.75"]),
    "same sigma twice": (lambda: PhasePlan.from_sigmas([[1.0, 0.5], [0.5]]), ["descend", "0.5 before 0.5"]),
    "too close": (lambda: PhasePlan.from_sigmas([[1.0, 0.9995]]), ["0.1 %", "1.0 before 0.9995"]),
    "flat sigmas": (lambda: PhasePlan.from_sigmas([1.0, 0.5]), ["one list of numbers for each phase", "[1.0, 0.5]"]),
    "long array": (lambda: PhasePlan.from_sigmas(np.linspace(1, 0.1, 60)), ["one list of numbers", "found array(["]),
    "word as sigma": (lambda: PhasePlan.from_sigmas([["one"]]), ["one list of numbers", "'one'"]),
    "phases in a list": (lambda: PhasePlan([Phase("a", (1.0,))]), ["tuple of Phase", "[Phase(", "from_sigmas"]),
    "phases that are none": (lambda: PhasePlan(("a",)), ["tuple of Phase", "('a',)"]),
    "sigmas in a list": (lambda: PhasePlan((Phase("a", [1.0]),)), ["sigmas of a Phase are a tuple", "[1.0]"]),
    "nothing as steps": (lambda: PhasePlan.from_steps(None), ["whole numbers", "found None"]),
    "a number as steps": (lambda: PhasePlan.from_steps(4), ["whole numbers", "found 4"]),
    "too many steps": (lambda: PhasePlan.from_steps([10**9, 10**9]), ["at most 1000 steps", "found 2000000000"]),
    "too many sigmas": (
        lambda: PhasePlan.from_sigmas([[0.99**i for i in range(1001)]]),
        ["at most 1000 steps", "found 1001"],
    ),
    "too long a name": (lambda: PhasePlan.from_sigmas([[1.0]], ["a" * 10**6]), ["1 to 64", "aaa..."]),
    "refined too far": (lambda: PhasePlan.from_steps([2]).refined(10**9), ["at most 1000 steps", "found 1000000000"]),
    "no steps": (lambda: PhasePlan.from_steps([]), ["at least 1", "[]"]),
    "zero steps": (lambda: PhasePlan.from_steps([2, 0]), ["at least 1", "[2, 0]"]),
    "half a step": (lambda: PhasePlan.from_steps([2, 1.5]), ["whole numbers", "[2, 1.5]"]),
    "truth value as steps": (lambda: PhasePlan.from_steps([True]), ["whole numbers", "[True]"]),
    "shift zero": (lambda: PhasePlan.from_steps([2], shift=0), ["positive", "found 0"]),
    "shift nan": (lambda: PhasePlan.from_steps([2], shift=math.nan), ["positive", "nan"]),
    "shift as text": (lambda: PhasePlan.from_steps([2], shift="5"), ["positive", "'5'"]),
    "unknown key of a plan": (
        lambda: PhasePlan.from_dict({"phases": [phase()], "shift": 5}),
        ["exactly the keys ['phases']", "['phases', 'shift']"],
    ),
    "missing key of a plan": (lambda: PhasePlan.from_dict({}), ["exactly the keys ['phases']", "keys []"]),
    "unknown key of a phase": (
        lambda: PhasePlan.from_dict({"phases": [phase(boundary=0.5)]}),
        ["exactly the keys ['name', 'sigmas']", "'boundary'"],
    ),
    "missing key of a phase": (lambda: PhasePlan.from_dict({"phases": [{"name": "a"}]}), ["'sigmas'", "['name']"]),
    "plan is a list": (lambda: PhasePlan.from_dict([phase()]), ["a phase plan is an object", "list"]),
    "phases is an object": (lambda: PhasePlan.from_dict({"phases": phase()}), ["list", "dict"]),
    "phase is a list": (lambda: PhasePlan.from_dict({"phases": [[1.0]]}), ["a phase is an object", "list"]),
    "sigmas is a number": (lambda: PhasePlan.from_dict({"phases": [phase(sigmas=1.0)]}), ["are a list", "float"]),
    "sigma in JSON is text": (lambda: PhasePlan.from_dict({"phases": [phase(sigmas=["1"])]}), ["numbers", "'1'"]),
    "sigma in JSON is true": (lambda: PhasePlan.from_dict({"phases": [phase(sigmas=[True])]}), ["numbers", "True"]),
    "not JSON": (lambda: PhasePlan.from_json("{phases"), ["is JSON", "not"]),
    "nothing as JSON": (lambda: PhasePlan.from_json(None), ["is JSON", "not"]),
    "nested too deep": (lambda: PhasePlan.from_json("[" * 100_000), ["is JSON", "not"]),
    "infinity in JSON": (
        lambda: PhasePlan.from_json('{"phases": [{"name": "a", "sigmas": [1, Infinity]}]}'),
        ["(0, 1]", "inf"],
    ),
    "whole number beyond floats": (
        lambda: PhasePlan.from_json('{"phases": [{"name": "a", "sigmas": [1%s]}]}' % ("0" * 400)),
        ["numbers", "000"],
    ),
    "whole number beyond Python's limit": (
        lambda: PhasePlan.from_json('{"phases": [{"name": "a", "sigmas": [1%s]}]}' % ("0" * 5000)),
        ["is JSON", "digits"],
    ),
}


@pytest.mark.parametrize(("make", "fragments"), BAD_PLANS.values(), ids=BAD_PLANS)
def test_what_is_not_a_plan_is_a_one_line_error_with_expected_and_found(make, fragments):
    with pytest.raises(PhasePlanError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 250
    for fragment in fragments:
        assert fragment in message


def test_plan_errors_are_value_errors():
    assert issubclass(PhasePlanError, ValueError)


@pytest.mark.parametrize("sigma", [0, 0.0, -0.1, 1.001, 937.5, math.nan, math.inf])
def test_sigma_outside_the_range_is_not_routed(sigma):
    with pytest.raises(PhasePlanError, match=r"\(0, 1\]") as caught:
        PhasePlan.from_steps([2, 2]).phase_index(sigma)
    assert repr(sigma) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("k", [-1, 2])
def test_interval_of_a_phase_that_is_not_there_is_an_error(k):
    with pytest.raises(PhasePlanError, match=rf"{k} is not in 0\.\.1"):
        PhasePlan.from_steps([2, 2]).interval(k)


@pytest.mark.parametrize("steps", [3, 0, -1, 4.0, True, None])
def test_refining_to_fewer_steps_is_refused(steps):
    with pytest.raises(PhasePlanError, match="at least the 4 steps of the plan, found"):
        PhasePlan.from_steps([2, 2]).refined(steps)
