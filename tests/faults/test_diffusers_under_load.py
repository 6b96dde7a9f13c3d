"""Phased pipelines that are used for long: errors, interrupts and other experts in between change no later sample."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from pdmd_core.experts import ExpertsError
from pdmd_core.phases import PhasePlan
from pdmd_core.pipelines import attach_experts, detach_experts
from tests.helpers.families.cases import CASES
from tests.helpers.tiny_pipelines import full_experts, lora_experts

ROOT = Path(__file__).parents[2]
CASE = CASES["wan"]
PLANS = {"four": PhasePlan.from_steps([2, 2], shift=5.0), "three": PhasePlan.from_steps([1, 1, 1], shift=3.0)}
WRITERS = {"lora": lora_experts, "full": full_experts}
SEEDS = range(4)
FRESH = """
import sys
import torch
from safetensors.torch import save_file
from pdmd_core.pipelines import attach_experts
from tests.helpers.families.cases import CASES
torch.set_num_threads(1)
case = CASES["wan"]
seeds, output, *folders = sys.argv[1:]
found = {}
for folder in folders:
    pipe = attach_experts(case.build(), folder)
    for seed in range(int(seeds)):
        found[f"{folder} {seed}"] = case.sample(pipe, latents=case.noise(seed)).contiguous()
save_file(found, output)
"""


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Experts of both kinds, with two and with three phases."""
    return [
        str(write(tmp_path / kind / name, CASE.build(), plan))
        for kind, write in WRITERS.items()
        for name, plan in PLANS.items()
    ]


@pytest.fixture
def expected(folders: list[str], tmp_path: Path) -> dict[str, Tensor]:
    """Latents by folder and seed, sampled by a process that does nothing else."""
    output = tmp_path / "fresh.safetensors"
    command = [sys.executable, "-c", FRESH, str(len(SEEDS)), str(output), *folders]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return load_file(output)


class Use:
    """One pipeline, and what its user does with it."""

    def __init__(self, folders: list[str], expected: dict[str, Tensor], seed: int) -> None:
        self.folders, self.expected, self.draw = folders, expected, random.Random(seed)
        self.pipe = CASE.build()
        self.folder = ""
        self.other_experts()

    @property
    def steps(self) -> int:
        return len(self.pipe.phased.plan.sigmas)

    def sample(self, **more: Any) -> None:
        seed = self.draw.choice(SEEDS)
        latents = CASE.sample(self.pipe, latents=CASE.noise(seed), **more)
        assert torch.equal(latents, self.expected[f"{self.folder} {seed}"])

    def other_experts(self, folder: str | None = None) -> None:
        if self.folder:
            detach_experts(self.pipe)
        self.folder = folder or self.draw.choice(self.folders)
        attach_experts(self.pipe, self.folder)

    def interrupt(self) -> None:
        at = self.draw.randrange(self.steps)

        def stop(pipe: DiffusionPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            pipe._interrupt = step == at
            return tensors

        CASE.sample(self.pipe, callback_on_step_end=stop)

    def press_control_c(self) -> None:
        at = self.draw.randrange(self.steps)

        def stop(pipe: DiffusionPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if step == at:
                raise KeyboardInterrupt
            return tensors

        with pytest.raises(KeyboardInterrupt):
            CASE.sample(self.pipe, callback_on_step_end=stop)

    def run_out_of_memory_at_a_switch(self) -> None:
        phase = self.draw.randrange(1, len(self.pipe.phased.plan))
        with fails_in(self.pipe, phase), pytest.raises(torch.OutOfMemoryError):
            CASE.sample(self.pipe)

    def ask_for_other_steps(self) -> None:
        with pytest.raises(ValueError, match="steps"):
            CASE.sample(self.pipe, num_inference_steps=self.steps + 1)

    def attach_what_does_not_fit(self, misfit: str) -> None:
        detach_experts(self.pipe)
        with pytest.raises(ExpertsError):
            attach_experts(self.pipe, misfit)
        attach_experts(self.pipe, self.folder)


@contextmanager
def fails_in(pipe: DiffusionPipeline, phase: int) -> Iterator[None]:
    """The first forward of this phase finds no memory."""

    def fail(*_: object) -> None:
        if pipe.scheduler.phase == phase:
            raise torch.OutOfMemoryError("out of memory")

    handles = [n.proj_out.register_forward_pre_hook(fail) for n in pipe.phased.networks or [pipe.transformer]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def memory() -> tuple[int, int]:
    """How many tensors there are, and their bytes."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gc also knows deprecated attributes
        tensors = [found for found in gc.get_objects() if isinstance(found, Tensor)]
    return len(tensors), sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("rounds", [40, pytest.param(500, marks=pytest.mark.long)])
def test_every_sample_is_that_of_a_fresh_process_and_memory_returns(
    rounds: int, folders: list[str], expected: dict[str, Tensor], tmp_path: Path
) -> None:
    use = Use(folders, expected, seed=rounds)
    misfit = str(lora_experts(tmp_path / "misfit", CASES["flux"].build(), PLANS["four"]))
    before_steps = {
        "interrupt": use.interrupt,
        "control-c": use.press_control_c,
        "out of memory": use.run_out_of_memory_at_a_switch,
        "other experts": use.other_experts,
        "other steps": use.ask_for_other_steps,
        "misfit": lambda: use.attach_what_does_not_fit(misfit),
        "nothing": lambda: None,
    }
    baseline: dict[str, tuple[int, int]] = {}
    for _ in range(2):  # the second time, what diffusers and peft keep for good is there
        for folder in folders:
            use.other_experts(folder)
            use.sample()
            baseline[folder] = memory()
    done = set()
    for _ in range(rounds):
        name = use.draw.choice(list(before_steps))
        before_steps[name]()
        use.sample()
        done.add(name)
    assert done == set(before_steps)
    for folder in folders:
        use.other_experts(folder)
        use.sample()
        assert memory() == baseline[folder]
