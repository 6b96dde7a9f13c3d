"""Network weights that are read and written one tensor at a time, so that no whole model has to fit into memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import ExpertsError
from .header import DTYPES, TensorSpec
from .mapped import MappedFile

T = TypeVar("T")

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Weights:
    """Named tensors that are read when they are asked for."""

    specs: Mapping[str, TensorSpec]
    """Name to how the tensor is stored."""
    read: Callable[[str], Tensor]
    """A function from a name to the tensor, of the shape in ``specs`` and perhaps in a wider dtype."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of each tensor."""
        return {name: spec.shape for name, spec in self.specs.items()}

    @property
    def nbytes(self) -> int:
        """The size in a file, in bytes."""
        return sum(spec.nbytes for spec in self.specs.values())

    def renamed(self, rename: Callable[[str], str]) -> Weights:
        """Give the same tensors other names.

        Args:
            rename: A function from the old name to the new one.

        Returns:
            The renamed weights.

        Raises:
            ValueError: If two tensors would get the same name.
        """
        old = {rename(name): name for name in self.specs}
        if len(old) != len(self.specs):
            raise ValueError("two weights would get one name")
        return Weights({new: self.specs[name] for new, name in old.items()}, lambda name: self.read(old[name]))

    def stored_as(self, dtype: torch.dtype, keep: Sequence[str] = ()) -> Weights:
        """Store floating weights in another dtype.

        Args:
            dtype: The dtype.
            keep: Parts of names, between dots, whose weights are stored in float32 instead.

        Returns:
            The weights with other specs.
        """

        def stored(name: str, spec: TensorSpec) -> TensorSpec:
            if not spec.dtype.is_floating_point:
                return spec
            return replace(spec, dtype=torch.float32 if set(keep) & set(name.split(".")) else dtype)

        return Weights({name: stored(name, spec) for name, spec in self.specs.items()}, self.read)


def open_weights(*files: Path) -> Weights:
    """Open the tensors of safetensors files, which are mapped into memory (``MappedFile``); only headers are read.

    Args:
        *files: Safetensors files with different tensors.

    Returns:
        The weights. Reading one raises ExpertsError if its file is unreadable by then.

    Raises:
        ExpertsError: If a file is missing or not valid, or if two files hold a tensor of one name.
    """
    places: dict[str, MappedFile] = {}
    for path in files:
        file = MappedFile(path)
        if twice := sorted(places.keys() & file.header.specs.keys()):
            raise ExpertsError(f"{path}: {twice[0]} is in another of these files as well: download them again")
        places |= dict.fromkeys(file.header.specs, file)
    specs = {name: file.header.specs[name] for name, file in places.items()}
    return Weights(specs, lambda name: places[name].tensor(name))


def weights_of(tensors: Mapping[str, Tensor]) -> Weights:
    """Take tensors in memory as weights.

    Args:
        tensors: Tensors by name.

    Returns:
        The weights.
    """
    specs = {name: TensorSpec(value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    return Weights(specs, lambda name: tensors[name])


def write_weights(path: Path, weights: Weights, metadata: Mapping[str, str]) -> str:
    """Write a safetensors file, tensor by tensor; equal weights make equal files.

    Args:
        path: The file to write.
        weights: The weights.
        metadata: Texts for ``__metadata__``.

    Returns:
        The SHA-256 of the file.

    Raises:
        ExpertsError: If a value is not finite in the dtype in which it is to be stored.
    """
    # widest first, as the library writes them: every tensor starts at a multiple of its own size
    order = sorted(weights.specs, key=lambda name: (-weights.specs[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in order:
        spec = weights.specs[name]
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, start + spec.nbytes],
        }
        start += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in (len(text).to_bytes(8, "little"), text):
            digest.update(chunk)
            file.write(chunk)
        for name in progress(order, path.name.strip(".")):
            data = _bytes(name, weights.read(name), weights.specs[name])
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


def _bytes(name: str, tensor: Tensor, spec: TensorSpec) -> memoryview:
    stored = tensor.to("cpu", spec.dtype).contiguous()
    if tuple(stored.shape) != spec.shape:
        raise ValueError(f"{name} has shape {tuple(stored.shape)}, its header says {spec.shape}")
    if not is_finite(stored):
        raise ExpertsError(f"{name} has values that are not finite in {dtype_name(spec.dtype)}: choose another dtype")
    return stored.reshape(-1).view(torch.uint8).numpy().data


def is_finite(tensor: Tensor) -> bool:
    """Check that no value is NaN or infinite.

    Args:
        tensor: A tensor of any dtype.

    Returns:
        Whether all values are finite.
    """
    if not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(tensor if tensor.dtype.itemsize > 1 else tensor.float()).all())


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype without "torch.", as in ``float32``.

    Args:
        dtype: The dtype.

    Returns:
        Its name.
    """
    return str(dtype).removeprefix("torch.")


def progress(items: Sequence[T], title: str) -> Iterable[T]:
    """Show a progress bar on a terminal where tqdm is installed.

    Args:
        items: What to go through.
        title: The title of the bar.

    Returns:
        The items.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    shown: Iterable[T] = tqdm(items, desc=title, leave=False, disable=None)
    return shown
