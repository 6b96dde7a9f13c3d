"""Shift and signal-to-noise ratio against their formulas."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdmd_core.noise_level import shift_sigma, signal_to_noise, unshift_sigma


@given(st.floats(0, 1), st.floats(0.05, 20))
def test_unshift_inverts_shift(raw, shift):
    assert unshift_sigma(shift_sigma(raw, shift), shift) == pytest.approx(raw, abs=1e-12)


@given(st.floats(0.01, 100))
def test_shift_keeps_both_ends_exactly(shift):
    assert shift_sigma(0.0, shift) == unshift_sigma(0.0, shift) == 0
    assert shift_sigma(1.0, shift) == unshift_sigma(1.0, shift) == 1


@given(st.floats(0, 1), st.floats(0.05, 20))
def test_shift_is_the_documented_formula(raw, shift):
    assert shift_sigma(raw, shift) == pytest.approx(shift * raw / (1 + (shift - 1) * raw), rel=1e-9)


def test_signal_to_noise():
    assert signal_to_noise(0.5) == 1
    assert signal_to_noise(0.2) == pytest.approx(16)
    assert signal_to_noise(1.0) == 0
    assert signal_to_noise(0.0) == math.inf
