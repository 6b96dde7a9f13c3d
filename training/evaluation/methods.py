"""The methods that a report compares: a teacher in some numbers of steps, and experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pdmd_core.experts import PhasedExperts
from pdmd_core.phases import PhasePlan
from training.config.command_line import UserError
from training.evaluation.distilled import open_experts

if TYPE_CHECKING:  # it imports diffusers, and --help needs this module
    from training.data.teacher import TeacherSource
    from training.memory.quantization import Quantization

REFERENCE_SEED = 1_000_000
"""The seeds of the reference start here, those of the methods at 0."""


@dataclass(frozen=True)
class Method:
    """What samples are made with: experts as their plan says, or the teacher in some steps."""

    name: str
    """What its row of the report is called."""
    experts: PhasedExperts | None = None
    """The experts; None for the teacher."""
    steps: int = 0
    """Steps of the teacher."""
    first_seed: int = 0
    """The seed of the first sample of each prompt."""
    quantization: Quantization = "none"
    """How the base of LoRA experts is kept while they sample."""

    @property
    def network_calls(self) -> int:
        """Network calls for one batch, guidance not counted."""
        return len(self.experts.manifest.plan.sigmas) if self.experts else self.steps


@dataclass(frozen=True)
class Teacher:
    """The teacher and how it samples."""

    source: TeacherSource
    """Where it is."""
    shift: float
    """Shift of its steps, which are uniform in raw time."""
    guidance_scale: float
    """Classifier-free guidance; 1 is none."""
    negative_prompt: str = ""
    """What guidance moves away from."""

    @property
    def guided(self) -> bool:
        """Whether it takes two network evaluations a step."""
        return self.guidance_scale != 1


def named_experts(items: Sequence[str]) -> dict[str, PhasedExperts]:
    """Open experts folders under the names of their rows.

    Args:
        items: ``FOLDER``, which is named after its place and steps, or ``NAME=FOLDER``.

    Returns:
        Name of the row to its experts, in their order.

    Raises:
        UserError: When two have one name, or a name or a folder is empty.
        ExpertsError: When a folder holds no experts.
    """
    found: dict[str, PhasedExperts] = {}
    for item in items:
        name, equals, folder = item.partition("=")
        if not equals or Path(item).is_dir():
            name, folder = "", item
        elif not (name.strip() and folder.strip()):
            raise UserError(f"--experts: expected [NAME=]FOLDER, found {item!r}")
        experts = open_experts(folder)
        steps = len(experts.manifest.plan.sigmas)
        if not name:
            place = Path(folder).resolve()
            own = place.parent.name if place.name == "experts" else place.name
            name = f"{'phase experts' if len(items) == 1 else own}, {steps} step{'' if steps == 1 else 's'}"
        if name in found:
            raise UserError(f"--experts: two are called {name!r}: give them names of their own, as in NAME={folder}")
        found[name] = experts
    return found


def methods_of(
    teacher: Teacher,
    experts: Mapping[str, PhasedExperts],
    many: int | None,
    few: Sequence[int] | None,
    quantizations: Sequence[Quantization] = (),
    strengths: Sequence[float] = (),
) -> list[Method]:
    """The rows of a report in their order: the teacher in many and in few steps, then the experts.

    Args:
        teacher: How the teacher samples.
        experts: Name of the row to its experts.
        many: Steps of the noise floor, the first row; None leaves that row out.
        few: Steps of further rows of the teacher; those of the experts when None.
        quantizations: Each adds a row for experts on a base that is kept so.
        strengths: Each adds a row for LoRA experts at this strength, in place of the one that their manifest says.

    Raises:
        UserError: When experts have the name of another row, or are not LoRA experts where the base is quantized.
        ExpertsError: When experts are full ones where strengths are given.
        PhasePlanError: When the teacher cannot sample in so many steps.
    """
    if few is None:
        few = sorted({len(own.manifest.plan.sigmas) for own in experts.values()})
    numbers = list(dict.fromkeys([*([] if many is None else [many]), *few]))
    for number in numbers:
        PhasePlan.from_steps([number], teacher.shift)  # says what is wrong with it
    guided = " with guidance" if teacher.guided else ""
    methods = [Method(f"teacher, {n} step{'' if n == 1 else 's'}{guided}", steps=n) for n in numbers]
    for kind in quantizations:
        from training.memory.quantization import library_config  # it imports torch.distributed

        library_config(kind)  # says what is missing
    for name, own in experts.items():
        methods.append(Method(name, own))
        if quantizations and any(expert.kind != "lora" for expert in own.manifest.experts):
            raise UserError(f"--quantization is of the base of LoRA experts, {name!r} are full networks: leave it out")
        methods += [Method(f"{name}, {kind} base", own, quantization=kind) for kind in dict.fromkeys(quantizations)]
        methods += [Method(f"{name}, strength {s:g}", own.at_strength(s)) for s in dict.fromkeys(strengths)]
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--experts: {name!r} is the name of another row: choose another NAME=FOLDER")
    return methods
