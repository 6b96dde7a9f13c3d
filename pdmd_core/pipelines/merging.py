"""LoRA experts that are merged into the network's own weights as they take their turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..experts import ExpertsError
from ..experts.format.fingerprint import network_weights
from ..experts.lora.changes import Change, Dense, LowRank
from .differences import Differences
from .offload import is_offloaded_in_parts

Merge = bool | Literal["copies"]
"""Whether experts are merged: not, in place, or into a copy of the weights for each phase."""

_SAMPLES = 64
"""Values of each weight by which a change of the base is noticed."""
_BETWEEN = -1
"""The phase while weights are being written."""


class MergedExperts(Differences):
    """Weights of a network that are those of the base plus the expert's change in each phase.

    In place, a copy of the base's weights is kept in host memory, and every phase is written from it, so that nothing
    adds up: after ``switch(None)`` the weights have the bits that they had. With copies, weights of each phase are made
    when it first takes its turn and stay where the base's are; a switch then only changes what the parameters refer to.

    Args:
        network: The network; its weights are as the base has them.
        copies: Whether the weights of every phase are kept.
    """

    def __init__(self, network: nn.Module, copies: bool) -> None:
        super().__init__(network)
        self.copies = copies
        self.changes: dict[int, dict[str, list[Change]]] = {}
        self._seen: tuple[Tensor, tuple[object, ...]] | None = None

    def add(self, phase: int, changes: Mapping[str, Sequence[Change]], what: str) -> None:
        """Take the changes of a phase.

        Args:
            phase: The index of the phase.
            changes: Weight to what is added to it, of its shape.
            what: What the changes come from, for errors.

        Raises:
            ExpertsError: If a weight is packed or offloaded, so that nothing can be added to it.
        """
        weights = network_weights(self.network)
        if is_offloaded_in_parts(self.network):
            raise ExpertsError(
                f"{what} cannot be merged into a network that is offloaded in parts: offload whole models, or leave "
                "merge= out"
            )
        for name, found in changes.items():
            if tuple(weights[name].shape) != found[0].shape or not _plain(weights[name]):
                raise ExpertsError(
                    f"{what} cannot be merged into {name}, which is quantised in this pipeline: leave merge= out (the "
                    "experts are adapters then), or load the base unquantised"
                )
            self.changes.setdefault(phase, {}).setdefault(name, []).extend(found)

    def add_adapter(self, phase: int, adapter: str, what: str) -> None:
        """Take an adapter that is on the network as the changes of a phase; the adapter itself stays.

        Args:
            phase: The index of the phase.
            adapter: Its name.
            what: What it comes from, for errors.

        Raises:
            ExpertsError: As ``add`` does.
        """
        from peft.tuners.lora import Linear, LoraLayer

        for name, layer in self.network.named_modules():
            if not isinstance(layer, LoraLayer) or adapter not in layer.r:
                continue
            own: Any = layer
            if isinstance(layer, Linear) and not layer.use_dora[adapter]:
                down, up = (half[adapter].weight.detach().clone() for half in (own.lora_A, own.lora_B))
                change: Change = LowRank(down, up, own.scaling[adapter])
            else:
                change = Dense(own.get_delta_weight(adapter).detach())
            self.add(phase, {f"{name.replace('_orig_mod.', '').replace('.base_layer', '')}.weight": [change]}, what)

    def switch(self, phase: int | None) -> None:
        """Give the weights the values of a phase.

        Args:
            phase: The index of the phase; None for the base.

        Raises:
            RuntimeError: If the network has been quantised or offloaded in parts since, which would undo it.
        """
        if phase == self.phase or not self.changes:
            return
        if is_offloaded_in_parts(self.network):
            raise RuntimeError(
                "merged experts cannot be on a network that is offloaded in parts: offload whole models "
                "(enable_model_cpu_offload), or load the experts without merge="
            )
        weights = network_weights(self.network)
        with torch.inference_mode(False), torch.no_grad():
            if self.phase is None:
                self._remember(weights)
            own = self.changes.get(phase, {}) if phase is not None else {}
            self.phase = _BETWEEN
            for name, base in self.base.items():
                weight = weights[name]
                if not self.copies:
                    weight.data.copy_(_sum(base.to(weight.device), own[name]) if name in own else base)
                elif phase is None or name not in own:
                    weight.data = base
                else:
                    weight.data = self._copy(phase, name)
            self.phase = phase

    def rest(self) -> None:
        """Give the weights the values of the base."""
        self.switch(None)

    def _remember(self, weights: Mapping[str, Tensor]) -> None:
        """Keep the base's weights, which may have been moved, cast or changed since they last were.

        Raises:
            RuntimeError: If they have been quantised.
        """
        names = dict.fromkeys(name for changes in self.changes.values() for name in changes)
        if packed := next((name for name in names if not _plain(weights[name])), None):
            raise RuntimeError(f"{packed} was quantised after experts were merged: load them without merge=")
        sample = torch.cat([_sampled(weights[name]) for name in names]).cpu()
        settings = (*(weights[name].dtype for name in names), *self._fused())
        same = self._seen is not None and torch.equal(sample, self._seen[0]) and settings == self._seen[1]
        if not same:
            self.of_phase = {}
        if self.copies:
            self.base = {name: weights[name].data for name in names}
        elif not same:
            self.base = {name: weights[name].detach().to("cpu", copy=True) for name in names}
        self._seen = sample, settings

    def _fused(self) -> tuple[object, ...]:
        """LoRAs that are fused into the base's weights."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in self.network.modules() if isinstance(module, BaseTunerLayer)]
        return tuple(tuple(layer.merged_adapters) for layer in layers)

    def _copy(self, phase: int, name: str) -> Tensor:
        """The weight of a phase, where the base's is."""
        base, kept = self.base[name], self.of_phase.setdefault(phase, {})
        found = kept.get(name)
        if found is None:
            kept[name] = _sum(base, self.changes[phase][name]).to(base.dtype)
        elif found.device != base.device:
            kept[name] = found.to(base.device)
        return kept[name]


def _plain(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.dtype.itemsize >= 2


def _sampled(weight: Tensor) -> Tensor:
    """Values of a weight, all over it."""
    return weight.detach().flatten()[:: max(1, weight.numel() // _SAMPLES)].double()


def _sum(base: Tensor, changes: Sequence[Change]) -> Tensor:
    """The base's weight and changes of it, in float32 on its device."""
    value = base.float()
    for change in changes:
        if isinstance(change, LowRank):
            down, up = (half.to(value.device).float() for half in (change.down, change.up))
            value = torch.addmm(value, up, down, alpha=change.scale)
        else:
            value = value + change.scale * change.value.to(value.device).float()
    return value
