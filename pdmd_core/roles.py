"""Roles: which weights a forward pass uses. Teacher, one expert for each phase, and the fake score network.

With ``lora`` a role is an adapter on the one frozen base network (the teacher is the base with adapters off), so memory
is one base plus adapters. With ``full`` a role owns a copy. Which of the two is chosen for each role. A teacher of two
networks is a mixture: each sample goes to the network that runs at its sigma. So is a role that stands on both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .batch import in_groups
from .checks import check_choice, check_number
from .families import Conditioning, ModelFamily, TeacherRouting
from .flow import Sigma, at_least_float32
from .phases import PhasePlan
from .role_weights import (
    activate_adapter,
    adapter_parameters,
    add_adapter,
    check_fits,
    full_copy,
    reset_adapter,
    state_without_adapters,
)

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

TEACHER = "teacher"
FAKE = "fake"
RoleKind = Literal["lora", "full"]


@dataclass(frozen=True)
class RoleSpec:
    """How a role holds its weights.

    Raises:
        ValueError: A value cannot be; one line that starts with its name.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    kind: RoleKind = "lora"
    """Adapter on the frozen base, or a full copy of it."""
    rank: int = 64
    """LoRA rank."""
    alpha: float = 8.0
    """LoRA alpha; the adapter is scaled by alpha / rank."""
    targets: tuple[str, ...] | None = None
    """Suffixes of the modules that LoRA adapts; those of the family if null."""
    components: tuple[str, ...] | None = None
    """Networks of a two-network teacher that it stands on, at all sigmas if it is one. All of them if null; in a
    configuration, null is the one of its sigmas for an expert."""

    def __post_init__(self) -> None:
        """Check the values."""
        check_choice("kind", self.kind, RoleKind)
        check_number("rank", self.rank, at_least=1, whole=True)
        check_number("alpha", self.alpha, above=0)
        for name, value in (("targets", self.targets), ("components", self.components)):
            if value is not None and (not value or len(set(value)) < len(value)):
                raise ValueError(f"{name}: expected different names, or null, found {_names(value)}")


class Roles:
    """The networks of a distillation. Every role starts as the teacher, and all weights start frozen.

    Args:
        base: The teacher's network, or its two by component name. It is taken over: adapters are put into it, and its
            weights are frozen.
        family: The model family of the networks.
        specs: Name of each role but the teacher to how it holds its weights.
        routing: Which of two networks runs where; it names the one network where there is one.
        empty_copies: Give full copies their shapes on the meta device but no weights; the caller fills them.

    Raises:
        ValueError: If the networks are not those of the routing, or a role cannot stand on them.
    """

    def __init__(
        self,
        base: nn.Module | Mapping[str, nn.Module],
        family: ModelFamily,
        specs: Mapping[str, RoleSpec],
        routing: TeacherRouting | None = None,
        empty_copies: bool = False,
    ) -> None:
        if TEACHER in specs:
            raise ValueError("the teacher is the base network itself and takes no specification")
        self.family = family
        self.specs = dict(specs)
        self.routing = routing or TeacherRouting()
        bases = {self.routing.components[0]: base} if isinstance(base, nn.Module) else dict(base)
        if set(bases) != set(self.routing.components):
            raise ValueError(f"the teacher's networks are {_names(self.routing.components)}, found {_names(bases)}")
        self.bases = {name: bases[name].requires_grad_(False).eval() for name in self.routing.components}
        self._copies = {
            (role, name): full_copy(self.bases[name], empty_copies)
            for role, spec in specs.items()
            if spec.kind == "full"
            for name in self.components(role)
        }
        self._layers: dict[str, dict[str, BaseTunerLayer]] = {name: {} for name in self.bases}
        self._own: dict[str, dict[str, nn.Parameter]] = {}
        self._trainable: frozenset[str] = frozenset()
        self._active: dict[str, str] = {}
        self.teacher_plan: PhasePlan | None = None
        """With a teacher that is distilled, the plan of its experts, which are the roles ``teaching(name)``: each
        teaches at the sigmas of its interval. The base teaches when None."""
        self.before_use: Callable[[str], None] = lambda component: None
        """This is called with the teacher's network that is about to run, forwards or backwards."""
        self.before_role: Callable[[str], None] = lambda role: None
        """This is called with the role that is about to compute."""
        for role, spec in specs.items():
            if spec.kind == "lora":
                self._add_adapter(role, spec)
        self.set_trainable(())
        self.activate(TEACHER)

    def _add_adapter(self, role: str, spec: RoleSpec) -> None:
        targets = spec.targets or self.family.lora_targets
        for name in self.components(role):
            self._layers[name] = add_adapter(self.bases[name], role, spec.rank, spec.alpha, targets, self.family.blocks)
        for parameter in self.parameters(role):  # Adam-sized updates vanish in half precision, whatever the base's
            parameter.data = at_least_float32(parameter.data)

    def components(self, role: str) -> tuple[str, ...]:
        """List the networks of the teacher that a role stands on.

        Args:
            role: The name of a role.

        Returns:
            Names of components, high noise first.

        Raises:
            KeyError: If there is no such role.
            ValueError: If the role stands on a network that the teacher does not have.
        """
        self._check_known(role)
        chosen = None if role == TEACHER else self.specs[role].components
        if chosen is None:
            return self.routing.components
        if not chosen or not set(chosen) <= set(self.routing.components):
            raise ValueError(
                f"{role!r} stands on {_names(chosen)}, the teacher's networks are {_names(self.routing.components)}"
            )
        return tuple(name for name in self.routing.components if name in chosen)

    def network(self, role: str, component: str | None = None) -> nn.Module:
        """Get the module that computes a role, with the right adapter active until another role is asked for.

        Args:
            role: The name of a role.
            component: Which network of a role that stands on two; the first when None.

        Returns:
            A network of the teacher, or the role's own copy.
        """
        component = component or self.components(role)[0]
        self._activate(role, component)
        return self._copies.get((role, component), self.bases[component])

    def velocity(self, role: str, x: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        """Evaluate a role. A role on two networks evaluates each on its part of the batch only.

        Where the weights of two networks are in shards, all processes must ask at sigmas of the same networks.

        Args:
            role: The name of a role.
            x: Samples of shape (batch, ...).
            sigma: Their noise level in (0, 1], a number or of shape (batch,).
            conditioning: What the samples are conditioned on: name to tensor of shape (batch, ...).

        Returns:
            The velocity of the shape of ``x``.
        """
        if role == TEACHER and (plan := self.teacher_plan) is not None:
            sigma = torch.as_tensor(sigma).expand(len(x))
            experts = [teaching(phase.name) for phase in plan.phases]
            owners = torch.tensor([plan.phase_index(one) for one in sigma.tolist()], device=sigma.device)
            return in_groups(owners, lambda k, *own: self.velocity(experts[k], *own), x, sigma, conditioning)
        components = self.components(role)
        if len(components) == 1:
            return self.family.velocity(self.network(role), x, sigma, conditioning)
        sigma = torch.as_tensor(sigma).expand(len(x))
        networks = (~self.routing.first_runs(sigma)).long()

        def evaluate(k: int, *own: Any) -> Tensor:
            return self.family.velocity(self.network(role, components[k]), *own)

        return in_groups(networks, evaluate, x, sigma, conditioning)

    def networks(self) -> list[nn.Module]:
        """List every network.

        Returns:
            Those of the teacher, then the full copies.
        """
        return [*self.bases.values(), *self._copies.values()]

    def forget_parameters(self) -> None:
        """Look up all parameters again, after those of networks were replaced by others."""
        self._own.clear()
        self._restore_gradients()

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Combine the velocities with prompt and negative prompt as the teacher's pipeline does.

        Args:
            positive: The velocity with the prompt, of shape (batch, ...).
            negative: The velocity with the negative prompt.
            scale: The guidance scale.

        Returns:
            The guided velocity.
        """
        return self.family.guide(positive, negative, scale)

    def activate(self, role: str, component: str | None = None) -> None:
        """Make the base networks compute a role. Nothing changes for a role that owns copies.

        Args:
            role: The name of a role.
            component: The one network to switch; all that the role stands on when None.
        """
        for name in self.components(role) if component is None else [component]:
            self._activate(role, name)

    def _activate(self, role: str, component: str) -> None:
        self.before_role(role)
        if (role, component) in self._copies:
            return
        self.before_use(component)
        if role == self._active.get(component):
            return
        activate_adapter(self._layers[component], None if role == TEACHER else role)
        self._active[component] = role

    def _check_known(self, role: str) -> None:
        if role != TEACHER and role not in self.specs:
            raise KeyError(f"unknown role {role!r}, expected one of: {', '.join([TEACHER, *self.specs])}")

    def parameters(self, role: str) -> list[nn.Parameter]:
        """List a role's own weights, without those of the shared base, in a fixed order.

        Args:
            role: The name of a role but the teacher.

        Returns:
            The parameters in the order of ``named_parameters``.
        """
        return list(self.named_parameters(role).values())

    def named_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """Get a role's own weights by name.

        Args:
            role: The name of a role but the teacher.

        Returns:
            ``<module>.lora_A`` and ``.lora_B``, or the network's own names, to parameters. Names of a role on two
            networks start with the component: ``transformer_2.<module>.lora_A``.

        Raises:
            KeyError: If the role is the teacher, or there is no such role.
        """
        if role == TEACHER:
            raise KeyError("the teacher has no weights of its own to train")
        if role not in self._own:
            named: dict[str, nn.Parameter] = {}
            for component in self.components(role):
                prefix = self._prefix(role, component)
                named |= {prefix + name: p for name, p in self._find_parameters(role, component).items()}
            self._own[role] = named
        return self._own[role]

    def owns_copies(self, role: str) -> bool:
        """Whether a role is full copies of its networks.

        Args:
            role: The name of a role.

        Returns:
            False for adapters and the teacher.
        """
        return (role, self.components(role)[0]) in self._copies

    def _prefix(self, role: str, component: str) -> str:
        return f"{component}." if len(self.components(role)) > 1 else ""

    def _find_parameters(self, role: str, component: str) -> dict[str, nn.Parameter]:
        if (role, component) in self._copies:
            return dict(self._copies[role, component].named_parameters())
        return adapter_parameters(self._layers[component], role)

    def set_trainable(self, roles: Iterable[str]) -> None:
        """Give gradient to exactly these roles from now on; everything else is frozen.

        Args:
            roles: Names of roles but the teacher.

        Raises:
            KeyError: If one is the teacher, or there is no such role.
        """
        trainable = frozenset(roles)
        for role in trainable:
            self.named_parameters(role)  # raises for the teacher and for unknown roles
        self._trainable = trainable
        self._restore_gradients()

    def _restore_gradients(self) -> None:
        # adapters come from peft with gradients of its choice
        for role in self.specs:
            wanted = role in self._trainable
            for parameter in self.named_parameters(role).values():
                if parameter.requires_grad != wanted:
                    parameter.requires_grad_(wanted)

    def reset(self, role: str, generator: torch.Generator | None = None) -> None:
        """Make a role the teacher again: zero up-projections and fresh down-projections, or copies of the base.

        Args:
            role: The name of a role but the teacher.
            generator: Of the fresh weights, on the CPU; torch's own when None.
        """
        if self.owns_copies(role):
            for component in self.components(role):
                self._copies[role, component].load_state_dict(self.base_state_dict(component))
            return
        reset_adapter(self.named_parameters(role), generator)

    def base_state_dict(self, component: str | None = None) -> dict[str, Tensor]:
        """Get the weights of a network of the teacher under its own names, without adapters.

        Args:
            component: Which network; the first when None.

        Returns:
            Name to tensor; not copies.
        """
        return state_without_adapters(self.bases[component or self.routing.components[0]])

    def state_dict(self, role: str) -> dict[str, Tensor]:
        """Get a role's own weights, detached; those of a full copy with its buffers.

        Args:
            role: The name of a role but the teacher.

        Returns:
            The names of ``named_parameters`` to tensors; not copies.
        """
        if self.owns_copies(role):
            return {
                self._prefix(role, component) + name: value
                for component in self.components(role)
                for name, value in self._copies[role, component].state_dict().items()
            }
        return {name: parameter.detach() for name, parameter in self.named_parameters(role).items()}

    def load_state_dict(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Copy weights into a role. Nothing changes when they do not fit.

        Args:
            role: The name of a role but the teacher.
            state: What ``state_dict`` gives.

        Raises:
            ValueError: If names or shapes differ.
        """
        own = self.state_dict(role)
        check_fits(role, own, state)
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])


def teaching(expert: str) -> str:
    """Name the role of an expert that teaches.

    Args:
        expert: The expert.

    Returns:
        The role.
    """
    return f"{TEACHER}_{expert}"


def _names(components: Iterable[str]) -> str:
    return " and ".join(components) or "none"
