"""Distilling the embedded teachers: pictures and clips, all roles LoRA adapters on one frozen base."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims.common.distilling import Recipe
from benchmarks.claims.common.methods import Method, Run
from pdmd_core.batch import Batch
from pdmd_core.experts import PhasedExperts
from pdmd_core.families.base import Conditioning
from pdmd_core.flow import Sigma
from pdmd_core.hashing import sha256_of, sha256_of_bytes
from pdmd_core.method import Objective, fake_roles
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import Roles, RoleSpec, teaching
from training.evaluation.sampler import Sampler
from training.loop.distilled_teacher import load_teacher, notes_of, taught_by

MODELS = Path(__file__).resolve().parents[3] / "training" / "embedded" / "models"
TEACHER_PARTS = ("transformer", "text_encoder", "tokenizer", "scheduler")
"""Of the pipeline; training never decodes, so the autoencoder is not one of them."""


def digest_of(files: list[Path]) -> str:
    """Of names and contents: it does not matter where the files lie."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + bytes.fromhex(sha256_of(file)))
    return digest.hexdigest()[:16]


def digest_of_teacher(parts: tuple[str, ...] = TEACHER_PARTS) -> str:
    """Of the weights and configurations that training depends on."""
    return digest_of([file for part in parts for file in sorted((MODELS / "teacher" / part).glob("*"))])


@dataclass(frozen=True)
class EmbeddedSettings:
    """What all methods share on one kind of samples."""

    frames: int
    prompts: tuple[str, ...]
    """Of training; the captions of the closed vocabulary."""
    recipe: Recipe
    guidance_scale: float
    shift: float = 5.0
    rank: int = 16
    """Of every role's adapter; alpha is equal."""
    teacher: str = field(default_factory=digest_of_teacher)

    def plan(self, method: Method) -> PhasePlan:
        """The phase plan of a method."""
        return PhasePlan.from_steps(method.steps, method.shift or self.shift)

    def objective(self, method: Method) -> Objective:
        """Its objective; experts that teach sample without guidance."""
        scale = 1.0 if method.of_experts else self.guidance_scale
        return replace(Objective(guidance_scale=scale), **method.objective)

    def recipe_of(self, method: Method) -> Recipe:
        """Its recipe."""
        return replace(self.recipe, **method.recipe)

    def specs(self, method: Method) -> tuple[RoleSpec, RoleSpec]:
        """How its experts and its fakes hold their weights."""
        usual = RoleSpec("lora", self.rank, float(self.rank))
        return method.expert or usual, method.fake or usual

    def as_dict(self) -> dict[str, Any]:
        """For identity and reports; the prompts by number and digest."""
        data = asdict(self)
        text = "\n".join(self.prompts)
        return {**data, "prompts": len(self.prompts), "prompts_digest": sha256_of_bytes(text.encode())[:16]}


def own_fake(fake: str, expert: str) -> str:
    """Every phase has fakes of its own."""
    return f"{fake}_of_{expert}"


def make_roles(
    sampler: Sampler,
    plan: PhasePlan,
    specs: tuple[RoleSpec, RoleSpec],
    fakes: Sequence[str] = (),
    teacher: PhasedExperts | None = None,
) -> Roles:
    """Experts and fakes for each, on a copy of the teacher's network; weights depend on torch's global seed.

    ``specs`` is how experts and how fakes hold their weights. Experts that teach are LoRAs of the experts' rank; each
    expert begins as the one of them that owns its first sigma.
    """
    names = [phase.name for phase in plan.phases]
    base = copy.deepcopy(sampler.pipeline.transformer)
    own = dict.fromkeys([own_fake(fake, name) for fake in fakes for name in names], specs[1])
    of_teacher = {role: RoleSpec(**note["spec"]) for role, note in notes_of(teacher).items()}
    roles = Roles(base, sampler.family, {**dict.fromkeys(names, specs[0]), **own, **of_teacher})
    load_teacher(teacher, roles)
    if teacher is not None:
        for phase in plan.phases:
            roles.load_state_dict(phase.name, roles.state_dict(teaching(taught_by(teacher, phase).name)))
    return roles


class PhaseView:
    """The roles as one phase sees them: fakes are its own. Counts evaluations by role, in batches of ``batch``."""

    def __init__(self, problem: EmbeddedProblem, phase: int) -> None:
        self.problem, self.roles, self.routing = problem, problem.roles, problem.roles.routing
        self.phase, self.expert = phase, problem.plan.phases[phase].name

    def velocity(self, role: str, x: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        """Ask a role."""
        self.problem.evaluations[role] += len(x) // self.problem.batch
        return self.roles.velocity(self._own(role), x, sigma, conditioning)

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Guide the teacher as its pipeline does."""
        return self.roles.guide(positive, negative, scale)

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The adapter of a role."""
        return self.roles.parameters(self._own(role))

    def components(self, role: str) -> tuple[str, ...]:
        """The networks that a role stands on."""
        return self.roles.components(self._own(role))

    def activate(self, role: str, component: str | None = None) -> None:
        """Make the network compute a role."""
        self.roles.activate(self._own(role), component)

    def set_trainable(self, roles: Iterable[str]) -> None:
        """Train these roles of the phase, beside those of phases that train at the same time."""
        self.problem.trainable[self.phase] = [self._own(role) for role in roles]
        self.roles.set_trainable([role for own in self.problem.trainable.values() for role in own])

    def _own(self, role: str) -> str:
        return own_fake(role, self.expert) if role in self.problem.fakes else role


class EmbeddedProblem:
    """The adapters of one run; ``sampler`` holds the teacher and the conditioning of the training prompts."""

    def __init__(self, run: Run, sampler: Sampler, settings: EmbeddedSettings) -> None:
        self.plan, self.objective = settings.plan(run.method), settings.objective(run.method)
        self.sampler, self.batch = sampler, settings.recipe_of(run.method).batch_size
        self.prompts = len(settings.prompts)
        torch.manual_seed(run.seed)
        self.fakes = fake_roles(self.plan, self.objective)
        teacher = PhasedExperts.open(MODELS / "experts") if run.method.of_experts else None
        self.roles = make_roles(sampler, self.plan, settings.specs(run.method), self.fakes, teacher)
        self.trainable: dict[int, list[str]] = {}
        self.evaluations: Counter[str] = Counter()

    def networks(self, phase: int) -> PhaseView:
        """The roles of a phase."""
        return PhaseView(self, phase)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Prompts and noise."""
        indices = torch.randint(self.prompts, (count,), generator=generator)
        noise = torch.randn(count, *self.sampler.shape, generator=generator)
        return Batch(noise, *self.sampler.prompts.conditioning_pair(indices, noise.device))

    def experts(self) -> dict[str, dict[str, Tensor]]:
        """The adapters of the experts."""
        return {phase.name: self.roles.state_dict(phase.name) for phase in self.plan.phases}
