"""A safetensors file: its header is checked as a whole, then the library's own reader maps its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ExpertsError
from .header import read_header
from .untrusted import shown


class MappedFile:
    """A safetensors file whose tensors are mapped into memory when they are asked for.

    A tensor is a private view of the file: it takes memory where its values are used, the system may drop that again,
    and a change of the tensor does not change the file. The file may be removed or replaced by another of its name
    meanwhile (not on Windows, where it is in use as long as a tensor of it). It may not be shortened in place: the
    system ends a process that uses what is no longer there.

    Args:
        path: The file. Only its header is read until a tensor is asked for.

    Raises:
        ExpertsError: If the header is not that of a whole safetensors file, in one line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self._reader: Any = None

    def tensor(self, name: str) -> Tensor:
        """Map a tensor of the file, on the CPU.

        Args:
            name: The name of the tensor.

        Returns:
            The tensor, as the file stores it.

        Raises:
            ExpertsError: If the file cannot be read any more, or became shorter since its header was read.
        """
        try:
            if self.path.stat().st_size < self.header.size:
                raise ExpertsError(f"{self.path}: became shorter while it was read")
            if self._reader is None:
                self._reader = safe_open(self.path, "pt")
            tensor: Tensor = self._reader.get_tensor(name)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ExpertsError(f"{self.path}: cannot be read ({shown(' '.join(str(error).split()))})") from None
        return tensor
