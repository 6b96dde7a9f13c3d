"""Code that uses a hub of ``tests/helpers/hub.py`` through the unmodified ``huggingface_hub``, in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, Self

from tests.helpers.hub import WRITER

ROOT = Path(__file__).resolve().parents[2]


class Outcome(NamedTuple):
    """What client code did: the value of its variable ``result``, or an error; and all it printed or logged."""

    result: Any
    error: str | None
    kind: str | None
    said: str


_WORKER = """
import contextlib, io, json, sys, time
pause = time.sleep
time.sleep = lambda seconds: pause(seconds / 20)  # between tries; what the hub does takes the time that it takes
for line in sys.stdin:
    said, names, error = io.StringIO(), {}, None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            exec(json.loads(line), names)
        except BaseException as caught:
            error = caught
    kind = type(error).__name__ if error is not None else None
    answer = [names.get("result"), str(error) if error is not None else None, kind, said.getvalue()]
    print(json.dumps(answer, default=str), flush=True)
"""


def client_environment(hub_url: str, home: Path, token: str | None, **more: str) -> dict[str, str]:
    """Environment of a process whose ``huggingface_hub`` talks to this hub and to nothing else."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    given = {"HF_TOKEN": token} if token else {}
    return {
        **kept,
        "HF_ENDPOINT": hub_url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **given,
        **more,
    }


class Client:
    """A process that runs code against a hub; a context manager. One runs many snippets: imports cost seconds."""

    def __init__(
        self, hub_url: str, home: Path, token: str | None = WRITER, cwd: Path | None = None, **more: str
    ) -> None:
        self.environment = client_environment(hub_url, home, token, **more)
        self.cwd = cwd

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            env=self.environment,
            cwd=self.cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def run(self, code: str) -> Outcome:
        """Run this code with names of its own."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        return Outcome(*json.loads(self.process.stdout.readline()))
