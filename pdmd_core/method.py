"""The choices of the method that are not the phase plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from .checks import check_choice, check_number
from .objectives import FakeTarget, FakeWeighting, GeneratorWeighting
from .phases import PhasePlan
from .roles import FAKE

ScoreRange = Literal["nested", "disjoint"]
FakeRollouts = Literal["blend", "whole", "per_step"]
ExpertRollouts = Literal["truncated", "through", "own_increment"]
ExpertLoss = Literal["matching", "regression", "denoising"]


_OF_ALL = {"guidance_scale", "expert_loss"}
"""Choices that mean something whatever trains the expert."""
_WITHOUT_FAKE = {"regression": {"path_steps"}, "denoising": {"path_steps", "score_shift"}}
"""Those that mean something without a fake, by what trains the expert. Matching has all but ``path_steps``."""


@dataclass(frozen=True)
class Objective:
    """The choices of the method that are not the plan; the defaults are the recipe.

    Raises:
        ValueError: A value cannot be; one line that starts with its name.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    guidance_scale: float = 4.0
    """Classifier-free guidance of the teacher; 1 is none. The fake and the experts run without."""
    expert_loss: ExpertLoss = "matching"
    """What trains the expert: matching, where teacher and fake differ at renoised samples; regression, without a fake,
    the mean velocity of the teacher's path over the drawn step; denoising, without a fake, the velocity of what the
    guided teacher samples: experts for many steps, which need no guidance and can teach matching."""
    path_steps: int = 4
    """With expert_loss regression or denoising, Euler steps of the teacher in place of one of the plan."""
    fake_weighting: FakeWeighting = "clamp"
    """How the fake's squared error is weighted near the end of the phase."""
    fake_target: FakeTarget = "unbiased"
    """What the fake learns; biased is an ablation."""
    generator_weighting: GeneratorWeighting = "dmd2"
    """Weight of the generator's gradient."""
    score_range: ScoreRange = "nested"
    """Noise levels t at which teacher and fake are compared: (s, 1), s the end of the phase; disjoint is only inside
    the phase (ablation)."""
    score_shift: float = 1.0
    """Those t are uniform in raw time under this shift."""
    margin: float = 0.02
    """With fake_weighting margin, t stays this far (relative to the range, in raw time) above s."""
    fake_rollouts: FakeRollouts = "blend"
    """What the fake learns in phases of several steps: blend, rollouts that jump to the end of the phase from a drawn
    step; whole, rollouts through all steps, as samples are made; per_step, a fake for each step from which they
    jump."""
    expert_rollouts: ExpertRollouts = "truncated"
    """How the drawn step of the expert trains in phases of several steps: truncated, by its jump to the end of the
    phase; in whole rollouts through the rest of the phase, or by its own_increment alone."""
    score_draws: int = 1
    """Noise levels t and noises at which an expert's samples are compared in an update."""

    def __post_init__(self) -> None:
        """Check the values."""
        check_number("guidance_scale", self.guidance_scale, at_least=1)
        check_choice("expert_loss", self.expert_loss, ExpertLoss)
        check_number("path_steps", self.path_steps, at_least=1, whole=True)
        check_choice("fake_weighting", self.fake_weighting, FakeWeighting)
        check_choice("fake_target", self.fake_target, FakeTarget)
        check_choice("generator_weighting", self.generator_weighting, GeneratorWeighting)
        check_choice("score_range", self.score_range, ScoreRange)
        check_number("score_shift", self.score_shift, above=0)
        check_number("margin", self.margin, at_least=0, below=1)
        check_choice("fake_rollouts", self.fake_rollouts, FakeRollouts)
        check_choice("expert_rollouts", self.expert_rollouts, ExpertRollouts)
        check_number("score_draws", self.score_draws, at_least=1, whole=True)
        if self.expert_rollouts != "truncated" and self.fake_rollouts != "whole":
            raise ValueError(
                f"expert_rollouts: expected truncated with fake_rollouts {self.fake_rollouts}, as the fake must know "
                f"what is compared with it, found {self.expert_rollouts}"
            )


def changed_choices(objective: Objective) -> dict[str, object]:
    """List the choices that are not the default, for the manifest.

    Args:
        objective: The choices of the method.

    Returns:
        Their names and values, but for the guidance scale and those without use.
    """
    left_out = {"guidance_scale", *choices_without_use(objective)}
    return {name: value for name, value in _changed(objective).items() if name not in left_out}


def choices_without_use(objective: Objective) -> list[str]:
    """Name the choices that are not the default and that change nothing with this ``expert_loss``.

    Args:
        objective: The choices of the method.

    Returns:
        Their names.
    """
    names = [name for name in _changed(objective) if name not in _OF_ALL]
    if objective.expert_loss == "matching":
        return [name for name in names if name == "path_steps"]
    return [name for name in names if name not in _WITHOUT_FAKE[objective.expert_loss]]


def _changed(objective: Objective) -> dict[str, object]:
    default, chosen = asdict(Objective()), asdict(objective)
    return {name: value for name, value in chosen.items() if value != default[name]}


def fake_roles(plan: PhasePlan, objective: Objective) -> tuple[str, ...]:
    """Name the fakes that a plan is trained with.

    Args:
        plan: The phase plan.
        objective: The choices of the method.

    Returns:
        The role of the one fake, or of one for each step of the longest phase; none without matching.
    """
    if objective.expert_loss != "matching":
        return ()
    most = max(len(phase.sigmas) for phase in plan.phases) if objective.fake_rollouts == "per_step" else 1
    return tuple(map(fake_of_step, range(most)))


def fake_of_step(step: int) -> str:
    """Name the fake of a step, where each step of a phase has one.

    Args:
        step: The step inside the phase, from 0.

    Returns:
        The role.
    """
    return FAKE if step == 0 else f"{FAKE}_{step + 1}"
