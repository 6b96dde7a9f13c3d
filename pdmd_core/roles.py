"""Roles: which weights a forward pass uses. Teacher, one expert for each phase, and the fake score network.

With ``lora`` a role is an adapter on the one frozen base network (the teacher is the base with adapters off), so memory
is one base plus adapters. With ``full`` a role owns a copy. Which of the two is chosen for each role.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from .families import Conditioning, ModelFamily
from .flow import Sigma, at_least_float32

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

TEACHER = "teacher"
FAKE = "fake"
RoleKind = Literal["lora", "full"]


@dataclass(frozen=True)
class RoleSpec:
    """How a role holds its weights. Rank, alpha and targets matter to ``lora`` only; scaling is alpha / rank."""

    kind: RoleKind = "lora"
    rank: int = 64
    alpha: float = 8.0
    targets: tuple[str, ...] | None = None
    """Module name suffixes to adapt; None for those of the family."""


class Roles:
    """The networks of a distillation. Every role starts as the teacher; all weights start frozen.

    base:  the teacher's network. It is taken over: adapters are put into it and its weights are frozen.
    specs: role name to how it holds weights, for every role but the teacher.
    """

    def __init__(self, base: nn.Module, family: ModelFamily, specs: Mapping[str, RoleSpec]) -> None:
        if TEACHER in specs:
            raise ValueError("the teacher is the base network itself and takes no specification")
        self.family = family
        self.specs = dict(specs)
        self.base = base.requires_grad_(False).eval()
        self._copies = {name: copy.deepcopy(self.base).float() for name, spec in specs.items() if spec.kind == "full"}
        self._layers: dict[str, BaseTunerLayer] = {}
        self._own: dict[str, dict[str, nn.Parameter]] = {}
        self._trainable: frozenset[str] = frozenset()
        self._active: str | None = None
        for name, spec in specs.items():
            if spec.kind == "lora":
                self._add_adapter(name, spec)
        self.set_trainable(())
        self.activate(TEACHER)

    def _add_adapter(self, name: str, spec: RoleSpec) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        targets = list(spec.targets or self.family.lora_targets)
        config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=targets)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the point
            inject_adapter_in_model(config, self.base, adapter_name=name)
        self._layers = {path: m for path, m in self.base.named_modules() if isinstance(m, BaseTunerLayer)}
        for parameter in self.parameters(name):  # Adam-sized updates vanish in half precision, whatever the base's
            parameter.data = at_least_float32(parameter.data)

    def network(self, role: str) -> nn.Module:
        """The module that computes this role, with the right adapter active. Valid until another role is asked for."""
        self.activate(role)
        return self._copies.get(role, self.base)

    def velocity(self, role: str, x: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        """The role's velocity at x of shape (batch, ...) and sigma (number or shape (batch,))."""
        return self.family.velocity(self.network(role), x, sigma, conditioning)

    def activate(self, role: str) -> None:
        """Make the base network compute this role; does nothing for a role that owns a copy."""
        self._check_known(role)
        if role in self._copies or role == self._active:
            return
        for layer in self._layers.values():
            if role == TEACHER:
                layer.enable_adapters(False)
            else:
                layer.set_adapter(role)
                layer.enable_adapters(True)
        self._active = role
        self._restore_gradients()

    def _check_known(self, role: str) -> None:
        if role != TEACHER and role not in self.specs:
            raise KeyError(f"unknown role {role!r}, expected one of: {', '.join([TEACHER, *self.specs])}")

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The role's own weights (not those of the shared base), in a fixed order."""
        return list(self.named_parameters(role).values())

    def named_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The role's own weights by name: ``<module>.lora_A`` / ``.lora_B``, or the network's own names."""
        if role == TEACHER:
            raise KeyError("the teacher has no weights of its own to train")
        self._check_known(role)
        if role not in self._own:
            self._own[role] = self._find_parameters(role)
        return self._own[role]

    def _find_parameters(self, role: str) -> dict[str, nn.Parameter]:
        if role in self._copies:
            return dict(self._copies[role].named_parameters())
        named = {}
        for path, layer in self._layers.items():
            if role in layer.lora_A:
                named[f"{path}.lora_A"] = layer.lora_A[role].weight
                named[f"{path}.lora_B"] = layer.lora_B[role].weight
        return named

    def set_trainable(self, roles: Iterable[str]) -> None:
        """Exactly these roles get gradient from now on; everything else is frozen."""
        trainable = frozenset(roles)
        for role in trainable:
            self.named_parameters(role)  # raises for the teacher and for unknown roles
        self._trainable = trainable
        self._restore_gradients()

    def _restore_gradients(self) -> None:
        # peft freezes whatever adapter is not active, which would cut a graph that is still to be run backwards.
        for role in self.specs:
            wanted = role in self._trainable
            for parameter in self.named_parameters(role).values():
                if parameter.requires_grad != wanted:
                    parameter.requires_grad_(wanted)

    def reset(self, role: str, generator: torch.Generator | None = None) -> None:
        """Make the role the teacher again: up-projections zero, fresh down-projections; or a copy of the base."""
        if role in self._copies:
            self._copies[role].load_state_dict(self.base_state_dict())
            return
        with torch.no_grad():
            for name, parameter in self.named_parameters(role).items():
                if name.endswith("lora_B"):
                    parameter.zero_()
                else:
                    bound = 1 / parameter.shape[1] ** 0.5
                    parameter.uniform_(-bound, bound, generator=generator)

    def base_state_dict(self) -> dict[str, Tensor]:
        """The teacher's weights under the network's own names, without adapters."""
        state = {}
        for name, value in self.base.state_dict().items():
            if ".lora_A." in name or ".lora_B." in name:
                continue
            state[name.replace(".base_layer.", ".")] = value
        return state

    def state_dict(self, role: str) -> dict[str, Tensor]:
        """The role's own weights, detached, by the names of ``named_parameters`` (buffers too for a full copy)."""
        if role in self._copies:
            return self._copies[role].state_dict()
        return {name: parameter.detach() for name, parameter in self.named_parameters(role).items()}

    def load_state_dict(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Inverse of ``state_dict``. Raises ValueError, and changes nothing, when names or shapes differ."""
        own = self.state_dict(role)
        if set(own) != set(state):
            raise ValueError(
                f"the weights of {role!r} do not match its network: missing {_few(set(own) - set(state))}, "
                f"unexpected {_few(set(state) - set(own))}"
            )
        for name, value in own.items():
            if value.shape != state[name].shape:
                raise ValueError(
                    f"{role!r} expects {name} of shape {tuple(value.shape)}, found {tuple(state[name].shape)}"
                )
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])


def _few(names: set[str]) -> str:
    shown: Sequence[str] = sorted(names)[:2]
    return f"{len(names)} ({', '.join(shown)}{', ...' if len(names) > 2 else ''})" if names else "none"
