from __future__ import annotations

import json
import weakref
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from pdmd_core.experts.format.header import DTYPES, TensorSpec
from pdmd_core.experts.format.weights import Weights, open_weights, write_weights
from pdmd_core.hashing import sha256_of
from tests.helpers.tiny import randn


def test_write_weights_writes_the_bytes_of_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {
        "b.half": randn(3, 5).to(torch.bfloat16),
        "a.full": randn(2, 2),
        "c.scalar": torch.tensor(2.5),
        "d.empty": torch.zeros(0, 4),
        "e.bool": torch.tensor([True, False, True]),
        "f.whole": torch.arange(3),
        "g.view": randn(4, 6).T,
        "h ünï": randn(1),
    }
    plain = {key: value.contiguous() for key, value in tensors.items()}
    for metadata in ({}, {"key": 'text with "quotes" and ü'}):
        safetensors.torch.save_file(plain, tmp_path / "theirs", metadata=metadata or None)
        specs = {key: TensorSpec(value.dtype, tuple(value.shape)) for key, value in tensors.items()}
        digest = write_weights(tmp_path / "ours", Weights(specs, tensors.__getitem__), metadata)
        assert digest == sha256_of(tmp_path / "ours")
        found, names = safetensors.torch.load_file(tmp_path / "ours"), set(tensors)
        assert set(found) == names and all(torch.equal(found[key], value) for key, value in plain.items())
        with safe_open(tmp_path / "ours", "pt") as file:
            assert (file.metadata() or {}) == metadata
        ours, theirs = (tmp_path / "ours").read_bytes(), (tmp_path / "theirs").read_bytes()
        start, also = (8 + int.from_bytes(data[:8], "little") for data in (ours, theirs))
        assert ours[start:] == theirs[also:] and start % 8 == 0
        assert json.loads(ours[8:start]) == json.loads(theirs[8:also])
    opened = open_weights(tmp_path / "ours")
    assert opened.specs == specs and all(torch.equal(opened.read(key), value) for key, value in plain.items())


def test_every_dtype_that_can_be_read_can_be_written(tmp_path: Path) -> None:
    tensors = {name: torch.ones(3).to(dtype) for name, dtype in DTYPES.items()}
    specs = {name: TensorSpec(value.dtype, (3,)) for name, value in tensors.items()}
    write_weights(tmp_path / "all", Weights(specs, tensors.__getitem__), {})
    opened = open_weights(tmp_path / "all")
    assert opened.specs == specs and all(opened.read(n).dtype == dtype for n, dtype in DTYPES.items())
    assert all(torch.equal(opened.read(name).double(), torch.ones(3).double()) for name in DTYPES)
    found = safetensors.torch.load_file(tmp_path / "all")
    assert all(torch.equal(found[name].double(), torch.ones(3).double()) for name in DTYPES)


def test_weights_are_written_one_at_a_time(tmp_path: Path) -> None:
    made: list[weakref.ref[Tensor]] = []
    most = 0

    def read(name: str) -> Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in made))
        tensor = torch.full((1000,), float(name))
        made.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    specs = {str(i): TensorSpec(torch.float32, (1000,)) for i in range(20)}
    write_weights(tmp_path / "x", Weights(specs, read), {})
    assert len(made) == 20 and most <= 1, "only the tensor that was written last may still be there"
