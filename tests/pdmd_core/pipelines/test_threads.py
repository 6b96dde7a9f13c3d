"""Pipelines that share experts, called from several threads at a time: each sample is that of a call alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from pdmd_core.phases import PhasePlan
from pdmd_core.pipelines import attach_experts
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.families.case import Case
from tests.helpers.families.cases import CASES
from tests.helpers.tiny_pipelines import KINDS, PLAN, euler, lora_experts, networks_of

SAMPLES = 6
"""Of each thread."""


@pytest.fixture(autouse=True)
def threads_change_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


def another(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline of the same networks and experts."""
    made = type(pipe).__mro__[1].from_pipe(pipe, dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return attach_experts(made, pipe)


def together(case: Case, pipes: list[DiffusionPipeline], noises: list[Tensor]) -> list[list[Tensor]]:
    """What each pipeline samples ``SAMPLES`` times from its noise, all at once."""
    start = threading.Barrier(len(pipes))

    def use(pipe: DiffusionPipeline, noise: Tensor) -> list[Tensor]:
        start.wait()
        return [case.sample(pipe, latents=noise) for _ in range(SAMPLES)]

    with ThreadPoolExecutor(len(pipes)) as pool:
        return list(pool.map(use, pipes, noises))


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("name", ["wan", "wan_two"])
def test_every_sample_of_every_thread_is_that_of_a_call_alone(
    name: str, threads: int, kind: str, tmp_path: Path
) -> None:
    case = CASES[name]
    first = case.build()
    components = {"components": ["transformer", "transformer_2"]} if (name, kind) == ("wan_two", "lora") else {}
    folder = KINDS[kind](tmp_path, first, PLAN, **components)
    attach_experts(first, folder)
    pipes = [first, *(another(first) for _ in range(threads - 1))]
    assert len({id(pipe.scheduler) for pipe in pipes}) == threads
    networks, noises = networks_of(case, folder), [case.noise(seed) for seed in range(threads)]
    expected = [euler(case, PLAN, networks, noise) for noise in noises]
    for found, right in zip(together(case, pipes, noises), expected, strict=True):
        assert all(torch.equal(sample, right) for sample in found)


def test_merged_experts_take_turns_whole(tmp_path: Path) -> None:
    case = CASES["wan"]
    first = case.build()
    attach_experts(first, lora_experts(tmp_path, first, PLAN), merge=True)
    pipes, noises = [first, another(first)], [case.noise(1), case.noise(2)]
    expected = [case.sample(first, latents=noise) for noise in noises]
    for found, right in zip(together(case, pipes, noises), expected, strict=True):
        assert all(torch.equal(sample, right) for sample in found)


def test_one_pipeline_in_two_threads_takes_one_call_after_the_other(kind: str, tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = case.build()
    folder = KINDS[kind](tmp_path, pipe, PLAN)
    attach_experts(pipe, folder)
    noises = [case.noise(1), case.noise(2)]
    expected = [euler(case, PLAN, networks_of(case, folder), noise) for noise in noises]
    for found, right in zip(together(case, [pipe, pipe], noises), expected, strict=True):
        assert all(torch.equal(sample, right) for sample in found)


def test_threads_may_walk_other_numbers_of_steps(kind: str, tmp_path: Path) -> None:
    case, plan = CASES["wan"], PLAN
    first = case.build()
    folder = KINDS[kind](tmp_path, first, plan)
    second = another(attach_experts(first, folder))
    second.scheduler = PhasedDMDScheduler.from_plan(plan, refine=True)
    networks, noise = networks_of(case, folder), case.noise()
    walked: list[PhasePlan] = [plan, plan.refined(7)]
    start = threading.Barrier(2)

    def use(index: int) -> list[Tensor]:
        start.wait()
        return [case.sample([first, second][index], num_inference_steps=len(walked[index].sigmas)) for _ in range(3)]

    with ThreadPoolExecutor(2) as pool:
        for found, steps in zip(pool.map(use, range(2)), walked, strict=True):
            assert all(torch.equal(sample, euler(case, steps, networks, noise)) for sample in found)
