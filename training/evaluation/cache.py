"""What evaluation keeps on disk: rows of tensors by id. Nothing is computed twice, nothing damaged is used."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from pdmd_core.experts.format.header import read_header
from pdmd_core.experts.format.mapped import MappedFile
from pdmd_core.hashing import sha256_of, sha256_of_bytes

_NAME = 32
"""Hexadecimal digits of a file's hash in its name."""


class TensorCache:
    """Rows of tensors under ids, in the safetensors files of a folder; each file holds what was added at once.

    A file is named after its own SHA-256 and takes its place as a whole: a run that is killed leaves all of a batch or
    none of it. Opening the cache reads every file and deletes those that do not match their names, with a line on
    standard error; their ids are then missing like those that were never added. Whoever needs a cache again keeps it
    open: files are not read a second time.

    Args:
        folder: Where the files are; it need not be there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[str, tuple[Path, int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            if sha256_of(path)[:_NAME] != path.stem:
                print(f"{path}: damaged, its content is computed again", file=sys.stderr)
                path.unlink()
                continue
            self._index(path)

    def _index(self, path: Path) -> None:
        ids: list[str] = json.loads(read_header(path).metadata["ids"])
        self._where |= {name: (path, row) for row, name in enumerate(ids)}

    def __contains__(self, name: str) -> bool:
        """Whether there is a row of this id."""
        return name in self._where

    def missing(self, ids: Sequence[str]) -> list[str]:
        """List those of the ids that are not here, in their order, each once."""
        return [name for name in dict.fromkeys(ids) if name not in self._where]

    def add(self, ids: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Write a file.

        Args:
            ids: Names of the rows.
            tensors: Tensors of shape (ids, ...) by name.

        Raises:
            ValueError: When a tensor has another number of rows.
        """
        wrong = {name: tuple(value.shape) for name, value in tensors.items() if len(value) != len(ids)}
        if wrong:
            raise ValueError(f"expected {len(ids)} rows of each tensor, found shapes {wrong}")
        data = save(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, {"ids": json.dumps(list(ids))}
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{sha256_of_bytes(data)[:_NAME]}.safetensors"
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(data)
        part.replace(path)
        self._index(path)

    def rows(self, ids: Sequence[str], tensors: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Read rows.

        Args:
            ids: Names of the rows, in any order.
            tensors: Names of the tensors; all when None.

        Returns:
            Tensors by name, with the rows in the order of the ids.

        Raises:
            KeyError: When an id is missing.
        """
        places: dict[Path, list[tuple[int, int]]] = {}
        for position, name in enumerate(ids):
            path, row = self._where[name]
            places.setdefault(path, []).append((position, row))
        found: dict[str, list[Tensor]] = {}
        for path, rows in places.items():
            file = MappedFile(path)
            for name in file.header.specs if tensors is None else tensors:
                values, column = file.tensor(name), found.setdefault(name, [torch.empty(0)] * len(ids))
                for position, row in rows:
                    column[position] = values[row : row + 1]
        return {name: torch.cat(values) for name, values in found.items()}
