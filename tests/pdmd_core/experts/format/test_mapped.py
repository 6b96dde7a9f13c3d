"""Tensors of a safetensors file, mapped into memory by the library's own reader."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pdmd_core.experts.format.header import DTYPES, TensorSpec
from pdmd_core.experts.format.mapped import MappedFile
from tests.helpers.conversions import refused


def test_a_file_that_shrinks_while_it_is_read_is_one_line(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(4)}, tmp_path / "x")
    file = MappedFile(tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with refused("became shorter"):
        file.tensor("a")
    (tmp_path / "x").unlink()
    with refused("cannot be read"):
        file.tensor("a")


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says what is in memory")
def test_a_tensor_takes_memory_where_its_values_are_used(tmp_path: Path) -> None:
    specs, size = {"a": TensorSpec(torch.float32, (2**14, 2**13)), "b": TensorSpec(torch.float32, (2,))}, 2**29
    path = tmp_path / "x"
    write_header(path, specs)
    os.truncate(path, path.stat().st_size + size + 8)
    file, before = MappedFile(path), resident()
    found = file.tensor("a")
    assert found.shape == (2**14, 2**13) and found[2**13, :8].tolist() == [0.0] * 8
    found[0] += 1
    assert MappedFile(path).tensor("a")[0].max() == 0, "a change is the process's own"
    assert resident() - before < size / 16


def write_header(path: Path, specs: dict[str, TensorSpec]) -> None:
    entries, start = {}, 0
    for name, spec in specs.items():
        end = start + spec.nbytes
        entries[name], start = {"dtype": "F32", "shape": spec.shape, "data_offsets": [start, end]}, end
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def test_tensors_of_a_file_outlive_it(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(4)}, tmp_path / "x")
    safetensors.torch.save_file({"a": torch.zeros(4)}, tmp_path / "y")
    file = MappedFile(tmp_path / "x")
    found = file.tensor("a")
    (tmp_path / "y").replace(tmp_path / "x")
    assert torch.equal(found, torch.ones(4))
    (tmp_path / "x").unlink()
    del file
    assert torch.equal(found, torch.ones(4))


def test_tensors_that_are_not_aligned_are_read(tmp_path: Path) -> None:
    """As files have them that other programs wrote."""
    dtypes = {"a": "U8", "b": "F32", "c": "F8_E4M3", "d": "F64", "e": "I64"}
    tensors = {name: torch.arange(3).to(DTYPES[dtype]) for name, dtype in dtypes.items()}
    entries, data = {}, b""
    for name, value in tensors.items():
        raw = value.view(torch.uint8).numpy().tobytes()
        entries[name] = {"dtype": dtypes[name], "shape": [3], "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(entries).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + data)
    file = MappedFile(tmp_path / "x")
    for name, value in tensors.items():
        found = file.tensor(name)
        assert found.dtype == value.dtype and torch.equal(found.double() + 1, value.double() + 1)
