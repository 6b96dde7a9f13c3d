"""The weights of a teacher's networks in their files: identified and read part by part, never whole in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pdmd_core.experts.base_files import WEIGHTS_NAME
from pdmd_core.experts.format.fingerprint import Sampler, network_weights, sample_of, take_fingerprint
from pdmd_core.experts.format.weights import Weights, open_weights
from training.data.teacher import TeacherError, TeacherSource


class WeightFiles:
    """The files of a teacher's networks, mapped into memory: the system may drop at any time what was read of them.

    Args:
        source: Where the teacher is; its files are downloaded if need be.
        networks: Its networks by component, on the meta device.
        dtype: In which its networks are loaded.

    Raises:
        TeacherError: If the weights are not there under the names that diffusers gives them.
    """

    def __init__(self, source: TeacherSource, networks: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
        self.networks, self.dtype = networks, dtype
        self.folder = source.folder(tuple(networks))
        self.files = {component: _files(self.folder / component, source) for component in networks}
        for component, network in networks.items():
            there = open_weights(*self.files[component]).shapes
            for name, value in network.state_dict().items():
                if there.get(name) != tuple(value.shape):
                    raise TeacherError(
                        f"the teacher {source.path!r}: {component} needs {name} of shape {tuple(value.shape)}, its "
                        f"files have {there.get(name, 'none')}: save it again with save_pretrained of diffusers"
                    )

    def digest(self) -> str:
        """SHA-256 of the weights as they are loaded: the same wherever they lie, and in whatever files.

        Returns:
            64 hexadecimal digits.
        """
        digest = hashlib.sha256()
        for component, network in self.networks.items():
            weights = open_weights(*self.files[component])
            for name in network.state_dict():
                value = self._loaded(network, name, weights)
                digest.update(f"{component} {name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def fingerprints(self) -> dict[str, dict[str, str]]:
        """Take the fingerprint of each network (``pdmd_core.experts.format.fingerprint``)."""
        return {
            component: take_fingerprint(network_weights(network), self.sampler(component))
            for component, network in self.networks.items()
        }

    def sampler(self, component: str) -> Sampler:
        """Make what reads samples of a network's weights as they are loaded."""
        network, weights = self.networks[component], open_weights(*self.files[component])

        def sample(name: str) -> Tensor | None:
            values = sample_of(weights.read(name)) if name in weights.specs else None
            return None if values is None else values.to(stored_dtype(network, name, values.dtype, self.dtype))

        return sample

    def hollow(self) -> dict[str, nn.Module]:
        """Build the networks on the CPU with weights of the right shape and dtype that have no memory and no values.

        Adapters can be put beside such weights as beside others. ``fill`` gives values to what took their place.
        """
        built: dict[str, nn.Module] = {}
        for component, described in self.networks.items():
            settings: Any = described.config
            with init_empty_weights(include_buffers=False):
                network = type(described).from_config(settings)  # type: ignore[attr-defined]
            for module, own, name in _parameters(network):
                value = own.detach()
                dtype = stored_dtype(network, name, value.dtype, self.dtype)
                empty = torch.empty(1, dtype=dtype).expand(value.shape)
                setattr(module, name.rpartition(".")[2], nn.Parameter(empty, requires_grad=False))
            built[component] = network
        return built

    @torch.no_grad()
    def fill(self, component: str, state: Mapping[str, Tensor]) -> None:
        """Read the weights of a network into tensors; of those in shards, the rows of this process alone.

        Args:
            component: The network.
            state: Its weights by name, on any device.
        """
        weights = open_weights(*self.files[component])  # mapped anew, so that it can be let go of at the end
        for name, target in state.items():
            value = weights.read(name)
            if isinstance(target, DTensor):
                target.to_local().copy_(_own_rows(value, target))
            else:
                target.copy_(value)

    def _loaded(self, network: nn.Module, name: str, weights: Weights) -> Tensor:
        value = weights.read(name)
        return value.to(stored_dtype(network, name, value.dtype, self.dtype))


def stored_dtype(network: nn.Module, name: str, found: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """Tell in which dtype diffusers keeps a weight: it leaves some in float32.

    Args:
        network: The network.
        name: Of the weight.
        found: The dtype in the file.
        dtype: In which the network is loaded.
    """
    if not found.is_floating_point:
        return found
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    return torch.float32 if kept & set(name.split(".")) else dtype


def _own_rows(value: Tensor, shards: DTensor) -> Tensor:
    """Those that this process holds of a tensor that is divided along its first dimension."""
    mesh, last = shards.device_mesh, shards.device_mesh.ndim - 1  # before it are copies of the same shards
    rank, parts = mesh.get_local_rank(last), value.chunk(mesh.size(last))
    return parts[rank] if rank < len(parts) else value[:0]


def _parameters(network: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter, str]]:
    """The module that holds each parameter, the parameter, and its whole name."""
    for path, module in network.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            yield module, parameter, f"{path}.{name}" if path else name


def _files(folder: Path, source: TeacherSource) -> list[Path]:
    """The safetensors files of a network as diffusers writes them."""
    index = folder / f"{WEIGHTS_NAME}.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise source.cannot_load(error) from None
        return [folder / name for name in sorted(names)]
    if not (folder / WEIGHTS_NAME).is_file():
        raise TeacherError(
            f"the teacher {source.path!r}: {folder.name} has no {WEIGHTS_NAME}: save it again with save_pretrained of "
            "diffusers"
        )
    return [folder / WEIGHTS_NAME]
