"""Trainers one after the other in the processes that torchrun started; what has a checkpoint goes on from it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from accelerate.state import AcceleratorState

from training.config.schema import load_config
from training.loop.build import build_run
from training.loop.resumption import Resume
from training.loop.trainer import Trainer

for name in sys.argv[1:]:
    AcceleratorState._reset_state()  # it keeps the precision of the first run in a process
    Trainer(build_run(load_config(Path(name)), Resume())).run()
