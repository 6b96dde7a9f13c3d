"""Phase plans of any shape, for tests of properties."""

from __future__ import annotations

from hypothesis import strategies as st

from pdmd_core.phases import PhasePlan


@st.composite
def plans(draw: st.DrawFn) -> PhasePlan:
    """Plans of 1 to 6 phases with any descending sigmas, as close to each other as a plan allows."""
    steps = draw(st.lists(st.integers(1, 3), min_size=1, max_size=6))
    ratios = draw(st.lists(st.floats(0.3, 0.9985), min_size=sum(steps) - 1, max_size=sum(steps) - 1))
    flat = [1.0]
    for ratio in ratios:
        flat.append(flat[-1] * ratio)
    groups = [[flat.pop(0) for _ in range(count)] for count in steps]
    names = [f"{draw(st.sampled_from(['expert', 'noise_', 'p0']))}{k}" for k in range(len(steps))]
    return PhasePlan.from_sigmas(groups, draw(st.sampled_from([None, names])))
