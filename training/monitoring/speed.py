"""How fast a run goes, how long it will take, and what memory it uses."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import psutil
import torch

from pdmd_core.evaluations import evaluations_per_update
from training.config.schema import DistillConfig

_RECENT = 20
"""Updates over which speed is a median."""


@dataclass(frozen=True)
class Performance:
    """After an update."""

    seconds_per_update: float
    samples_per_second: float
    """Samples of generator updates."""
    evaluations_per_second: float
    """Network evaluations of one sample each; guidance counts as two."""
    seconds_left: float
    """At this speed, until all phases are trained; validations and checkpoints come on top."""
    memory_gib: float
    """Of the GPU of the main process, or of the process without one."""
    peak_memory_gib: float


class Speed:
    """Tells the time of updates; ``restart`` leaves out what was done since the last one."""

    def __init__(
        self, config: DistillConfig, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.device, self.clock, self.batch = device, clock, config.batch_size
        plan = config.plan.build()
        counts = [
            evaluations_per_update(
                plan, k, config.objective, config.fake_updates, config.draws_per_rollout, bool(config.rollouts.bank)
            )
            for k in range(len(plan))
        ]
        guided = config.objective.guidance_scale != 1
        self.evaluations = [sum(count.values()) + (count["teacher"] if guided else 0) for count in counts]
        """Of a sample, in one update of each phase."""
        self.updates = [config.updates_of(k) for k in range(len(plan))]
        self._rates: deque[float] = deque(maxlen=_RECENT)
        self._last = clock()

    def restart(self) -> None:
        """The next update begins now."""
        self._last = self.clock()

    def after_update(self, update: int) -> Performance:
        """An update is done, the update-th of all phases."""
        now, last = self.clock(), self._last
        self._last = now
        phase, done = self._place(update)
        self._rates.append(self.evaluations[phase] * self.batch / max(now - last, 1e-9))
        rate = median(self._rates)
        left = (self.updates[phase] - done) * self.evaluations[phase]
        left += sum(n * e for n, e in zip(self.updates[phase + 1 :], self.evaluations[phase + 1 :], strict=True))
        seconds = self.evaluations[phase] * self.batch / rate
        return Performance(seconds, self.batch / seconds, rate, left * self.batch / rate, *_memory(self.device))

    def _place(self, update: int) -> tuple[int, int]:
        """Phase of an update, and how many of the phase's are done with it."""
        for phase, count in enumerate(self.updates):
            if update <= count or phase + 1 == len(self.updates):
                return phase, update
            update -= count
        raise ValueError("a run has phases")


def _memory(device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30, torch.cuda.max_memory_allocated(device) / 2**30
    memory = psutil.Process().memory_info()
    peak = _peak_of_process() or memory.rss
    return memory.rss / 2**30, max(peak, memory.rss) / 2**30


def _peak_of_process() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def as_values(performance: Performance) -> dict[str, float]:
    """By name, to four digits."""
    return {name: float(f"{value:.4g}") for name, value in asdict(performance).items()}
