"""The header of a safetensors file, checked as a whole before a tensor is read or memory taken for it.

A file is 8 bytes (the length of the header, little endian), the header in JSON, and the tensors without gaps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ExpertsError
from .untrusted import parse_json, shown

MAX_HEADER_BYTES = 16 * 2**20
"""The most bytes of a header."""
MAX_TENSORS = 100_000
"""The most tensors in a file."""
MAX_DIMENSIONS = 8
"""The most dimensions of a tensor."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that are read: the names of safetensors to those of torch."""


@dataclass(frozen=True)
class TensorSpec:
    """How a tensor is stored."""

    dtype: torch.dtype
    """Its dtype in the file."""
    shape: tuple[int, ...]
    """Its shape."""

    @property
    def numel(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in a file, in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """What is in a file."""

    specs: Mapping[str, TensorSpec]
    """Name to how the tensor is stored."""
    metadata: Mapping[str, str]
    """The texts under ``__metadata__``."""
    size: int
    """Bytes of the whole file."""


def read_header(path: Path) -> Header:
    """Read and check the header of a file.

    Checked are its length, names (printable, none twice), dtypes, shapes, and that the tensors lie one after the other
    from the end of the header to the end of the file.

    Args:
        path: A safetensors file.

    Returns:
        The header.

    Raises:
        ExpertsError: If the file is missing, or if its header is not valid.
    """
    if not path.exists():
        raise ExpertsError(f"{path}: no such file")
    if not path.is_file():  # opening a pipe would wait for its other end
        raise ExpertsError(f"{path}: a safetensors file is expected here, found something else")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= MAX_HEADER_BYTES or 8 + length > size:
                raise ValueError(
                    f"the header is 2 to {MAX_HEADER_BYTES} bytes within the file, found {length} in {size} bytes"
                )
            text = file.read(length)
        return _header(_parsed(text), 8 + length, size)
    except (OSError, ValueError) as error:
        raise ExpertsError(f"{path}: not a readable safetensors file ({error}): download or convert it again") from None


def _parsed(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise ValueError(f"the header is a JSON object, found {shown(text[:20])}")
    try:
        entries: dict[str, Any] = parse_json(text)
    except ValueError as error:
        raise ValueError(f"the header is not JSON: {error}") from None
    return entries


def _header(entries: dict[str, Any], start: int, size: int) -> Header:
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is an object of texts")
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"at most {MAX_TENSORS} tensors, found {len(entries)}")
    specs, spans = {}, []
    for name, entry in entries.items():
        if not name.isprintable() or len(name) > 500:
            raise ValueError(f"the name of a tensor is at most 500 printable characters, found {shown(name)}")
        specs[name], span = _tensor(name, entry)
        spans.append((*span, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ValueError(f"tensor {shown(name)} starts at byte {position} of the data, found {shown(begin)}")
        position = end
    if start + position != size:
        raise ValueError(f"its header describes {start + position} bytes, found {size}: it was cut off or extended")
    return Header(specs, metadata, size)


def _tensor(name: str, entry: object) -> tuple[TensorSpec, tuple[int, int]]:
    """What a header says of one tensor: how it is stored, and its first byte and the one after its last."""
    what = f"tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{what} has dtype, shape and data_offsets, found {shown(entry)}")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{what} is of one of {', '.join(DTYPES)}, found {shown(dtype)}")
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{what} has a shape of at most {MAX_DIMENSIONS} whole numbers, found {shown(shape)}")
    if not _whole_numbers(span) or len(span) != 2:
        raise ValueError(f"{what} has two whole numbers as data_offsets, found {shown(span)}")
    spec = TensorSpec(DTYPES[dtype], tuple(shape))
    if span[1] - span[0] != spec.nbytes or math.prod(max(side, 1) for side in shape) >= 2**60:
        raise ValueError(f"{what} of shape {shown(shape)} in {dtype} does not fill its data_offsets {shown(span)}")
    return spec, (span[0], span[1])


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
