"""How many network evaluations an update takes."""

from __future__ import annotations

from .method import Objective
from .phases import PhasePlan


def evaluations_per_update(
    plan: PhasePlan, phase: int, objective: Objective, fake_updates: int, fake_draws: int, begun: bool = False
) -> dict[str, float]:
    """Count the network evaluations of one generator update of a phase, on average over the steps that train.

    Args:
        plan: The phase plan.
        phase: Index of the phase.
        objective: The choices of the method.
        fake_updates: Rollouts that the fake learns from, for each generator update.
        fake_draws: Gradient steps of the fake on one rollout.
        begun: Whether rollouts begin where the phase begins, with samples that earlier experts made once; with
            denoising, whether the teacher's samples were made once.

    Returns:
        Evaluations of one sample by what they are for: ``rollout``, ``fake`` (with gradient), ``generator`` (with
        gradient), ``teacher`` (guidance counts as one evaluation of twice the batch) and ``fake_score``. Regression has
        none of a fake, denoising has ``generator`` and the ``teacher``'s samples, none where they were made once.
    """
    earlier = 0 if begun else sum(len(p.sigmas) for p in plan.phases[:phase])
    steps = len(plan.phases[phase].sigmas)
    if objective.expert_loss == "regression":
        return {"rollout": earlier + (steps - 1) / 2, "generator": 1.0, "teacher": float(objective.path_steps)}
    if objective.expert_loss == "denoising":
        samples = 0 if begun else objective.path_steps * len(plan.sigmas)
        return {"generator": 1.0, "teacher": float(samples)}
    truncated, whole = earlier + (steps + 1) / 2, float(earlier + steps)
    of_fake = whole if objective.fake_rollouts == "whole" else truncated
    of_expert = truncated if objective.expert_rollouts == "truncated" else whole
    recorded = (steps + 1) / 2 if objective.expert_rollouts == "through" else 1.0
    return {
        "rollout": fake_updates * of_fake + of_expert - recorded,
        "fake": float(fake_updates * fake_draws),
        "generator": recorded,
        "teacher": float(objective.score_draws),
        "fake_score": float(objective.score_draws),
    }
