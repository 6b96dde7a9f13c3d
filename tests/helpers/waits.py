"""Where code would wait for a GPU, found without one: on tensors that hold nothing and say that they lie there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class _Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_gpu = isinstance(args[0], torch.Tensor) and args[0].is_cuda if args else False
        target = kwargs.get("device")
        if (
            func is torch.ops.aten._to_copy.default
            and target is not None
            and (torch.device(target).type == "cuda") != on_gpu
            and not kwargs.get("non_blocking")
        ):
            self.found.append(f"a copy {'from' if on_gpu else 'to'} the GPU")
        return func(*args, **kwargs)


@contextmanager
def waits() -> Iterator[list[str]]:
    """Inside, tensors may be made with ``device="cuda"``; the list has the copies that would wait.

    What needs values of such a tensor in the program raises an error.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _Waits() as found:
        yield found.found
