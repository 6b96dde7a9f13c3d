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
    """Raised by a run that ended because of a signal; it goes on from its checkpoint as if it had never stopped.

    Args:
        number: The signal.
        checkpoint: The checkpoint that was written.

    Attributes:
        exit_status: What a shell shows for a program that this signal ended.
    """

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}, all is in {checkpoint}: go on with --resume")
        self.exit_status = 128 + number


class StopSignals:
    """A context manager that catches signals, for the loop inside to ask for them.

    In another than the main thread, where Python catches none, there never is one.

    Args:
        device: Where processes tell each other of signals.
        verbose: Whether a line on standard error says that the run is about to stop.
    """

    def __init__(self, device: torch.device, verbose: bool = True) -> None:
        self.device, self.verbose = device, verbose
        self._received = 0
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup and the like decided that
                    self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self._received = not self._received, number
        if signal.SIGINT in self._previous_handlers:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if first and self.verbose:
            text = (
                f"\ndistill.py: {signal.Signals(number).name}: stopping after this update, a second Ctrl-C stops now\n"
            )
            os.write(2, text.encode())  # print may be what was interrupted

    def received(self) -> int:
        """Ask, on all processes together, for the signal that one of them received.

        Returns:
            The number of the signal, the same on all processes; 0 if there was none.
        """
        if not dist.is_initialized():
            return self._received
        number = torch.tensor(self._received, device=self.device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)
