"""The choices of the method that are compared at equal network evaluations of training."""

from __future__ import annotations

from benchmarks.claims.common.methods import METHODS, Method
from pdmd_core.evaluations import evaluations_per_update
from pdmd_core.method import Objective
from pdmd_core.phases import PhasePlan

_OWN = {"fake_rollouts": "whole", "expert_rollouts": "own_increment"}
_THROUGH = {"fake_rollouts": "whole", "expert_rollouts": "through"}
_PATH = {"expert_loss": "regression"}
_STEP = {"fake_rollouts": "per_step"}
_DRAWS = {"score_draws": 4}
_TWO, _FOUR, _ONES = (2, 2), (4,), (1, 1, 1, 1)

VARIANTS = {
    method.key: method
    for method in (
        METHODS["dmd_sgts"],
        METHODS["phased_2x2"],
        METHODS["phased_4x1"],
        Method("2x2_step", "2 x 2, a fake for each step", _TWO, _STEP),
        Method("2x2_own", "2 x 2, whole rollouts, own increments", _TWO, _OWN),
        Method("2x2_through", "2 x 2, whole rollouts, gradient through the phase", _TWO, _THROUGH),
        Method("2x2_path", "2 x 2, regression on the teacher's path", _TWO, _PATH),
        Method("2x2_path_8", "2 x 2, regression on its path of 8 steps", _TWO, _PATH | {"path_steps": 8}),
        Method("4x1_path", "4 x 1, regression on the teacher's path", _ONES, _PATH),
        Method("4_path", "one phase of 4, regression on the teacher's path", _FOUR, _PATH),
        Method("2x2_whole", "2 x 2, fake of whole rollouts, truncated steps", _TWO, {"fake_rollouts": "whole"}),
        Method("4_step", "one phase of 4, a fake for each step", _FOUR, _STEP),
        Method("4_own", "one phase of 4, whole rollouts, own increments", _FOUR, _OWN),
        Method("4_through", "one phase of 4, whole rollouts, gradient through the phase", _FOUR, _THROUGH),
        Method("4x1_draws", "4 x 1, four draws of t", _ONES, _DRAWS),
        Method("2x2_own_draws", "2 x 2, own increments, four draws of t", _TWO, _OWN | _DRAWS),
        Method("2x2_through_draws", "2 x 2, gradient through the phase, four draws of t", _TWO, _THROUGH | _DRAWS),
        METHODS["dmd_one_step"],
        Method("2_step", "one phase of 2, a fake for each step", (2,), _STEP),
        Method("2x1", "2 x 1", (1, 1)),
        Method("2x1_of_experts", "2 x 1, taught by the shipped four-step experts", (1, 1), of_experts=True),
        Method("2x4_step", "2 x 4, a fake for each step", (4, 4), _STEP),
        Method("4x2_step", "4 x 2, a fake for each step", (2, 2, 2, 2), _STEP),
        Method("8x1", "8 x 1", (1,) * 8),
    )
}
"""By key, those of four evaluations first."""
BASELINE = "phased_2x2"
"""What an equal number of evaluations is that of."""
OF_RECIPES = "2x2_own"
"""What the recipes for diffusion models use."""


def cost_of_updates(
    plan: PhasePlan, objective: Objective, fake_updates: int, draws: int, guidance: bool, begun: bool = False
) -> tuple[float, float]:
    """Network evaluations of an update on average over the phases of a plan: forward, and those that run backward.

    Args:
        plan: The phase plan.
        objective: The choices of the method.
        fake_updates: Rollouts that the fake learns from, for each generator update.
        draws: Gradient steps of the fake on one rollout.
        guidance: Whether the teacher is guided, which is two evaluations.
        begun: Whether updates begin with samples that were made once.
    """
    counts = [evaluations_per_update(plan, k, objective, fake_updates, draws, begun) for k in range(len(plan))]
    forward = sum(sum(count.values()) + guidance * count["teacher"] for count in counts)
    backward = sum(count.get("fake", 0) + count["generator"] for count in counts)
    return forward / len(plan), backward / len(plan)


def equal_updates(method: Method, cost: float, baseline: float, updates: int) -> int:
    """Updates over all phases that cost what ``updates`` of the baseline do; a backward evaluation counts as two.

    Args:
        method: Whose phases share them equally.
        cost: Of an update of the method.
        baseline: Of an update of the baseline.
        updates: Of the baseline.
    """
    phases = len(method.steps)
    return phases * max(1, round(updates * baseline / cost / phases))
