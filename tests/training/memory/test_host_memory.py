"""The flat buffer of weights in host memory: its size, what is there twice, and that pages are locked and unlocked."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from training.memory.host_memory import ALIGNMENT, HostCopy, flat_bytes, host_buffer

SIZES = ((5,), (3, 1000), (7, 9), ())


def tensors() -> list[Tensor]:
    """Of several dtypes; one of them is a column of another tensor."""
    torch.manual_seed(0)
    values = [torch.randn(size, dtype=torch.bfloat16 if k % 2 else torch.float32) for k, size in enumerate(SIZES)]
    return [*values, torch.arange(12).view(4, 3)[:, 1]]


def test_all_are_views_of_one_buffer_that_is_hardly_larger() -> None:
    own, wanted = tensors(), tensors()
    size = flat_bytes(own)
    assert sum(t.nbytes for t in own) <= size <= sum(t.nbytes for t in own) + ALIGNMENT * len(own)
    copy = HostCopy(own, host_buffer(size, torch.device("cpu")))
    assert copy.flat.numel() == size
    assert {t.untyped_storage().data_ptr() for t in own} == {copy.flat.data_ptr()}
    assert all(torch.equal(t, w) and t.dtype == w.dtype for t, w in zip(own, wanted, strict=True))
    elsewhere = copy.flat.clone()
    copy.place(copy.views_of(elsewhere))
    assert {t.untyped_storage().data_ptr() for t in own} == {elsewhere.data_ptr()}
    assert all(torch.equal(t, w) for t, w in zip(own, wanted, strict=True))


def test_each_gives_its_own_memory_back_before_the_next_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    own = tensors()[:3]
    before = [weakref.ref(t.untyped_storage()) for t in own]
    there: list[int] = []
    copy_ = Tensor.copy_

    def seen(self: Tensor, value: Tensor) -> Tensor:
        there.append(sum(ref() is not None for ref in before))
        return copy_(self, value)

    monkeypatch.setattr(Tensor, "copy_", seen)
    HostCopy(own, host_buffer(flat_bytes(own), torch.device("cpu")))
    assert there == [3, 2, 1]


def test_exactly_these_bytes_are_locked_until_the_buffer_is_gone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for CUDA, which refuses the second time."""
    locked: dict[int, int] = {}
    refuse = False

    def register(start: int, size: int, flags: int) -> int:
        if refuse:
            return 2
        locked[start] = size
        return 0

    cudart = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=locked.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    flat = host_buffer(5000, torch.device("cuda"))
    assert locked == {flat.data_ptr(): 5000}, "no power of two"
    view = flat[:10]
    del flat
    assert locked, "a view still needs it"
    del view
    assert not locked and not capsys.readouterr().err
    refuse = True
    assert host_buffer(5000, torch.device("cuda")).shape == (5000,)
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be locked for the GPU, copies to it take longer: raise the limit of locked memory" in line
