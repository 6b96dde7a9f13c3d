"""What one process of a run knows, for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed

from training.config.command_line import UserError

T = TypeVar("T")


def process_number() -> tuple[int, int]:
    """Number of this process, from 0, and how many there are."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def of_first_process(compute: Callable[[], T]) -> T:
    """Compute something in the first process, for all of them. All processes call this together.

    Args:
        compute: What computes it; only the first process calls this.

    Returns:
        What it returned.

    Raises:
        UserError: What it raised, on all processes.
    """
    rank, processes = process_number()
    if processes == 1:
        return compute()
    found: list[Any] = [None]
    if rank == 0:
        try:
            found = [compute()]
        except UserError as error:
            found = [error]
    torch.distributed.broadcast_object_list(found, src=0)
    if isinstance(found[0], UserError):
        raise found[0]
    value: T = found[0]
    return value
