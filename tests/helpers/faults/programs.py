"""Starting, watching and ending programs that run as forks of ``warm.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 300
"""Seconds until a program that should have ended is killed, however slow the machine is."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Ended:
    """status: negative when a signal ended it."""

    status: int
    output: str
    errors: str

    @property
    def lines(self) -> list[str]:
        """What the program itself said on standard error, without its warnings."""
        return [line for line in self._said if ".py: warning: " not in line]

    @property
    def warnings(self) -> list[str]:
        return [line for line in self._said if ".py: warning: " in line]

    @property
    def _said(self) -> list[str]:
        return [line for line in self.errors.replace("\r", "\n").splitlines() if ".py: " in line]


class Running:
    """A program that was started."""

    def __init__(self, warm: Warm, pid: int, output: Path, errors: Path) -> None:
        self.warm, self.pid, self.output, self.errors = warm, pid, output, errors

    def send(self, signal: int) -> None:
        os.kill(self.pid, signal)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Look until it holds."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, f"waited in vain: {self.errors.read_text('utf-8')[-2000:]}"
            time.sleep(0.02)

    def wait(self) -> Ended:
        """Until it has ended."""
        timer = threading.Timer(PATIENCE, os.kill, (self.pid, 9))
        timer.start()
        status = self.warm.ask({"wait": self.pid})
        timer.cancel()
        return Ended(status, self.output.read_text("utf-8"), self.errors.read_text("utf-8", errors="replace"))


class Warm:
    """The process that forks; ``folder`` is for what programs print."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, 0
        command = [sys.executable, str(Path(__file__).with_name("warm.py"))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        assert self._answer() == "ready"

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, request: Mapping[str, Any]) -> Any:
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def start(
        self,
        program: str,
        *arguments: str,
        faults: Sequence[Mapping[str, Any]] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Running:
        self.started += 1
        output, errors = (self.folder / f"{self.started}.{kind}" for kind in ("out", "err"))
        request = {"program": program, "arguments": arguments, "faults": list(faults), "output": str(output)}
        pid = self.ask({**request, "errors": str(errors), "environment": dict(environment or {})})
        return Running(self, pid, output, errors)

    def run(self, program: str, *arguments: str, faults: Sequence[Mapping[str, Any]] = ()) -> Ended:
        return self.start(program, *arguments, faults=faults).wait()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
