"""Changes of weights that are no LoRA (of norms, biases, tables), which take turns with the adapters of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..experts import ExpertsError
from ..experts.format.fingerprint import network_weights
from ..experts.lora.changes import Change
from .offload import is_offloaded_in_parts


def weight_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Tell the shapes of a network's weights, of packed ones too.

    Args:
        network: The network, with or without adapters.

    Returns:
        Name of each weight, without adapters, to the shape that it has unpacked.
    """
    shapes = {name: tuple(value.shape) for name, value in network_weights(network).items()}
    for name, module in network.named_modules():
        sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
        weight = f"{name.replace('_orig_mod.', '').replace('.base_layer', '')}.weight"
        if all(type(size) is int for size in sizes) and weight in shapes and "lora_" not in name:
            shapes[weight] = sizes  # type: ignore[assignment]
    return shapes


class Differences:
    """The values of a network's own weights in each phase, written into the weights when the phase changes.

    Args:
        network: The network; its weights are as the base has them.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.base: dict[str, Tensor] = {}
        self.of_phase: dict[int, dict[str, Tensor]] = {}
        self.phase: int | None = None
        """The phase whose values the weights have; None for those of the base."""

    def add(self, phase: int, changes: Mapping[str, Sequence[Change]], what: str) -> None:
        """Prepare the values of a phase; sums are in float32.

        Args:
            phase: The index of the phase.
            changes: Weight to what is added to it, of its shape.
            what: What the changes come from, for errors.

        Raises:
            ExpertsError: If a weight is packed or offloaded, so that nothing can be added to it.
        """
        weights = network_weights(self.network)
        if changes and is_offloaded_in_parts(self.network):
            raise ExpertsError(
                f"{what} changes weights that are no LoRA ({next(iter(changes))} for one), which cannot be on a "
                "network that is offloaded in parts: offload whole models, or convert to full experts"
            )
        for name, found in changes.items():
            weight = weights[name].detach()
            if tuple(weight.shape) != found[0].shape or not weight.is_floating_point() or weight.dtype.itemsize < 2:
                raise ExpertsError(f"{what} changes {name}, which is quantised in this pipeline: load it unquantised")
            self.base.setdefault(name, weight.clone())
            added = sum(change.dense().to(weight.device) for change in found)
            self.of_phase.setdefault(phase, {})[name] = (weight.float() + added).to(weight.dtype)

    @torch.no_grad()
    def switch(self, phase: int | None) -> None:
        """Give the weights the values of a phase.

        Args:
            phase: The index of the phase; None for the base.

        Raises:
            RuntimeError: If the network has been offloaded in parts, which would undo it.
        """
        if phase == self.phase or not self.base:
            return
        if is_offloaded_in_parts(self.network):
            raise RuntimeError(
                "these experts change weights that are no LoRA, which cannot be on a network that is offloaded in "
                "parts: offload whole models (enable_model_cpu_offload), or convert the experts to full ones"
            )
        weights, own = network_weights(self.network), self.of_phase.get(phase, {}) if phase is not None else {}
        for name, value in self.base.items():
            weights[name].data.copy_(own.get(name, value))
        self.phase = phase

    def rest(self) -> None:
        """End a call of a pipeline; these few weights keep the values of its last phase until the next one."""
