"""What a whole LoRA file adds to a network: read by the names of a model family, then fitted to one network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ...families import ModuleNames
from ..errors import ExpertsError
from .alpha import Alphas
from .changes import Change, Dense, changes_of_module, rank_of
from .keys import by_module, summary

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LoraFile:
    """The changes of weights that a LoRA file holds, and the keys of it that have no place."""

    what: str
    """What the file is, for errors and warnings."""
    weights: Mapping[str, list[Change]]
    """Name of a weight in diffusers to its changes, which add up."""
    keys: Mapping[str, list[str]]
    """Name of a weight to the keys that its changes come from."""
    left_out: list[str] = field(default_factory=list)
    """Keys that change nothing here."""

    def scaled(self, strength: float) -> LoraFile:
        """Multiply all changes.

        Args:
            strength: The factor; 1 is what was trained.

        Returns:
            The stronger or weaker file.
        """
        if strength == 1.0:
            return self
        weights = {name: [change.scaled(strength) for change in found] for name, found in self.weights.items()}
        return replace(self, weights=weights)

    def fitted(self, shapes: Mapping[str, tuple[int, ...]], network: str) -> LoraFile:
        """Keep what a network has a place for.

        Args:
            shapes: Name of each weight of the network to its shape.
            network: What the network is called, for errors.

        Returns:
            The changes that fit; other keys are added to those left out.

        Raises:
            ExpertsError: If a shape differs, or if nothing fits.
        """
        kept: dict[str, list[Change]] = {}
        left_out = list(self.left_out)
        for name, found in self.weights.items():
            if name in shapes:
                kept[name] = [self._of_shape(name, change, shapes[name], network) for change in found]
            else:
                left_out += self.keys[name]
        if not kept:
            raise ExpertsError(
                f"{self.what}: none of its keys belongs to a {network} (they look like {self._example()}): the file is "
                "of another model"
            )
        used = {key for name in kept for key in self.keys[name]}
        left_out = [key for key in dict.fromkeys(left_out) if key not in used]
        return replace(self, weights=kept, keys={name: self.keys[name] for name in kept}, left_out=left_out)

    def warning(self, network: str) -> str | None:
        """Name the keys that are left out.

        Args:
            network: What the network is called.

        Returns:
            One line; None where nothing is left out.
        """
        if not self.left_out:
            return None
        return (
            f"{self.what}: {len(self.left_out)} of its keys have no place in this {network} and change nothing: "
            f"{summary(self.left_out)}"
        )

    def _of_shape(self, name: str, change: Change, shape: tuple[int, ...], network: str) -> Change:
        if change.shape == shape:
            return change
        if isinstance(change, Dense) and _without_ones(change.shape) == _without_ones(shape):
            return replace(change, value=change.value.reshape(shape))
        raise ExpertsError(
            f"{self.what}: {name} has shape {shape} in this {network}, the file changes one of {change.shape}: it is "
            "of a network of another size"
        )

    def _example(self) -> str:
        first = next(iter(self.left_out), None) or next((keys[0] for keys in self.keys.values()), "none")
        return repr(first[:80])


def read_lora(
    tensors: Mapping[str, Tensor], alphas: Alphas, names: ModuleNames, what: str, component: str = "transformer"
) -> LoraFile:
    """Read a LoRA file of any program by the names of its family.

    Args:
        tensors: The tensors of the file by its keys.
        alphas: What its metadata say of alpha.
        names: The names of the family's weights.
        what: What the file is, for errors.
        component: The network that it is for, where the file holds changes of two.

    Returns:
        All that it changes.

    Raises:
        ExpertsError: If a module is not whole, or holds what is not applied.
    """
    modules, left_out = by_module(tensors)
    weights: dict[str, list[Change]] = {}
    sources: dict[str, list[str]] = {}
    of_two = len({module.startswith("transformer_2.") for module in modules}) == 2
    for module, meanings in modules.items():
        if "modulation difference" in meanings:
            key = meanings.pop("modulation difference")
            left_out += _parameter(names, f"{module}.modulation", key, tensors[key], weights, sources)
        if not meanings:
            continue
        place = names.place(module)
        elsewhere = of_two and module.startswith("transformer_2.") != (component == "transformer_2")
        if place is None or elsewhere or set(meanings) == {"alpha"}:
            left_out += meanings.values()
            continue
        if place.is_parameter:
            left_out += [key for meaning, key in meanings.items() if meaning != "weight difference"]
            if "weight difference" in meanings:
                key = meanings["weight difference"]
                _parameter(names, module, key, tensors[key], weights, sources)
            continue
        parts = {meaning: tensors[key] for meaning, key in meanings.items()}
        own = parts.pop("alpha", None)
        rank = rank_of(parts)
        scale = 1.0 if rank is None else alphas.scale(module, rank, None if own is None else float(own))
        for kind, changes in changes_of_module(parts, scale, f"{what}: {module}").items():
            for index, target in enumerate(place.names):
                name = f"{target}.{kind}"
                parts_of = [change.rows(index, place.shares) for change in changes]
                weights.setdefault(name, []).extend(c.swapped() if place.swapped else c for c in parts_of)
                own_keys = [key for meaning, key in meanings.items() if ("bias" in meaning) == (kind == "bias")]
                sources.setdefault(name, []).extend(own_keys)
    return LoraFile(what, weights, sources, left_out)


def _parameter(
    names: ModuleNames,
    name: str,
    key: str,
    value: Tensor,
    weights: dict[str, list[Change]],
    sources: dict[str, list[str]],
) -> list[str]:
    """Note the difference of a parameter; returns the key where there is no such parameter."""
    place = names.place(name)
    if place is None or not place.is_parameter:
        return [key]
    weights.setdefault(place.names[0], []).append(Dense(value))
    sources.setdefault(place.names[0], []).append(key)
    return []


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(side for side in shape if side != 1)
