"""The programs of this project in processes of their own that start at once: forks of one that has imported everything.

Reads a request a line, JSON on standard input, answers a line. ``{"program": "distill", "arguments": [...], "faults":
[...], "environment": {...}, "output": file, "errors": file}`` starts one and gives its process id,
``{"wait": process id}`` its exit status, negative when a signal ended it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from tests.helpers.faults.interference import interfere

IMPORTED = (
    "training.distill",
    "training.sample",
    "training.loop.trainer",
    "training.monitoring.observer",
    "pdmd_core.experts.hub.card",
    "pdmd_core.experts.format.weights",
    "diffusers.pipelines.wan.pipeline_wan",
    "diffusers.models.transformers.transformer_wan",
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "transformers.models.umt5.modeling_umt5",
    "peft.tuners.lora",
    "matplotlib.figure",
    "torch.distributed.fsdp",
)
"""What a run would import; a fork has it already."""


def main() -> None:
    """Answer until standard input ends."""
    torch.set_num_threads(1)
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may write between the answers
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                run(request)
        print(json.dumps(answer), file=answers, flush=True)


def run(request: dict[str, Any]) -> NoReturn:
    """Be the program that was asked for."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, name in enumerate(("output", "errors"), 1):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.environ.update(request["environment"])
        interfere(request["faults"])
        status = importlib.import_module(f"training.{request['program']}").main(request["arguments"])
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
