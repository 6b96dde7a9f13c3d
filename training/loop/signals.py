"""SIGINT and SIGTERM end a run after the update in progress, with a checkpoint; a second SIGINT ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A run that ended because of a signal. It goes on from ``checkpoint`` as if it had never stopped."""

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}, all is in {checkpoint}: go on with --resume")
        self.status = 128 + number
        """What a shell shows for a program that this signal ended."""


class StopRequest:
    """Notes signals inside a ``with`` block; the loop inside asks. Outside of the main thread nothing is noted."""

    def __init__(self, device: torch.device, speaks: bool = True) -> None:
        self.device, self.speaks = device, speaks
        self._number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup and the like decided that
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self._number = not self._number, number
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if first and self.speaks:
            text = (
                f"\ndistill.py: {signal.Signals(number).name}: stopping after this update, a second Ctrl-C stops now\n"
            )
            os.write(2, text.encode())  # print may be what was interrupted

    def number(self) -> int:
        """The signal that some process got, 0 if none did. All processes ask together."""
        if not dist.is_initialized():
            return self._number
        number = torch.tensor(self._number, device=self.device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)
