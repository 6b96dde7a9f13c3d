"""Weights that wait in host memory: many tensors in one flat buffer, page-locked where a GPU copies from it."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes: every tensor begins at a multiple of them, as in buffers of torch's own."""


class HostCopy:
    """Tensors that became views of one flat buffer in host memory.

    Each tensor gives its own memory back before the next is copied, so that together they are never there twice.

    Args:
        tensors: The tensors, on any device. Their data becomes the copy.
        flat: A buffer of ``flat_bytes(tensors)`` bytes in host memory.
    """

    def __init__(self, tensors: Iterable[Tensor], flat: Tensor) -> None:
        self.tensors, self.flat = list(tensors), flat
        self.views = self.views_of(flat)
        for tensor, view in zip(self.tensors, self.views, strict=True):
            view.copy_(tensor.data)
            tensor.data = view

    def views_of(self, flat: Tensor) -> list[Tensor]:
        """The tensors as they lie in another buffer with the same bytes, on any device."""
        views, start = [], 0
        for tensor in self.tensors:
            size = tensor.numel() * tensor.dtype.itemsize
            views.append(flat[start : start + size].view(tensor.dtype).view(tensor.shape))
            start += _aligned(size)
        return views

    def place(self, views: Sequence[Tensor]) -> None:
        """Let these be the data of the tensors."""
        for tensor, view in zip(self.tensors, views, strict=True):
            tensor.data = view


def flat_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of a buffer for these tensors."""
    return sum(_aligned(tensor.numel() * tensor.dtype.itemsize) for tensor in tensors)


def host_buffer(size: int, device: torch.device) -> Tensor:
    """Make a buffer in host memory from which a device is filled: of exactly this size.

    torch's own allocator of page-locked memory takes the next power of two, up to twice as much. So ordinary memory is
    locked in its place; where the system does not allow that, it stays ordinary, which is said.

    Args:
        size: In bytes.
        device: What is filled from it.

    Returns:
        Bytes of shape (size,).
    """
    flat = torch.empty(size, dtype=torch.uint8)
    if device.type == "cuda" and size and not _lock(flat):
        print(
            f"warning: {size / 2**30:.1f} GiB of host memory cannot be locked for the GPU, copies to it take longer: "
            "raise the limit of locked memory (ulimit -l)",
            file=sys.stderr,
        )
    return flat


def _lock(flat: Tensor) -> bool:
    """Lock the pages of a buffer until it is gone. Returns whether that is possible."""
    start = flat.data_ptr()
    if int(torch.cuda.cudart().cudaHostRegister(start, flat.numel(), 1)):
        return False
    weakref.finalize(flat.untyped_storage(), _unlock, start)
    return True


def _unlock(start: int) -> None:
    torch.cuda.synchronize()  # what is still copied from there
    torch.cuda.cudart().cudaHostUnregister(start)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
