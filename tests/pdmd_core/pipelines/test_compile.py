"""torch.compile: graphs are counted with a backend that runs them as they are, so outputs must be equal."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from torch._dynamo.testing import CompileCounter

from pdmd_core.pipelines import attach_experts, detach_experts
from tests.helpers.families.cases import CASES
from tests.helpers.tiny_pipelines import GIVEN, KINDS, PLAN, full_experts, lora_experts


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_networks(pipe: DiffusionPipeline, how: str, counter: CompileCounter) -> None:
    for name in ("transformer", "transformer_2"):
        network = getattr(pipe, name, None)
        if network is None:
            continue
        if how == "network.compile()":
            network.compile(backend=counter, fullgraph=True)
        elif how == "torch.compile(network)":
            setattr(pipe, name, torch.compile(network, backend=counter, fullgraph=True))
        else:
            network.compile_repeated_blocks(backend=counter, fullgraph=True)


HOW = ["network.compile()", "torch.compile(network)", "compile_repeated_blocks()"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("name", "kind"), [("wan", "lora"), ("wan", "full"), ("wan_two", "lora"), ("qwen_image", "lora")]
)
def test_nothing_is_compiled_again_after_the_first_sample(name: str, kind: str, how: str, tmp_path: Path) -> None:
    """Full graphs: two of one network with two adapters; experts of one architecture share one."""
    case = CASES[name]
    pipe = case.build()
    components = {"components": ["transformer", "transformer_2"]} if name == "wan_two" else {}
    attach_experts(pipe, KINDS[kind](tmp_path, pipe, PLAN, **components))
    expected, counter = case.sample(attach_experts(case.build(), tmp_path)), CompileCounter()
    compile_networks(pipe, how, counter)
    graphs = []
    for _ in range(3):
        assert torch.equal(case.sample(pipe), expected)
        graphs.append(counter.frame_count)
    assert graphs == [1 if kind == "full" else 2] * 3


@pytest.mark.parametrize("how", HOW)
def test_lora_experts_attached_to_a_compiled_pipeline(how: str, tmp_path: Path) -> None:
    case = CASES["wan"]
    plain = case.build()
    expected = case.sample(attach_experts(plain, lora_experts(tmp_path, plain, PLAN)))
    pipe, counter, call = case.build(), CompileCounter(), {"num_inference_steps": 4, **case.unguided}
    compile_networks(pipe, how, counter)
    before = case.sample(pipe, **call)
    assert counter.frame_count == 1
    attach_experts(pipe, tmp_path)
    for _ in range(3):
        assert torch.equal(case.sample(pipe), expected)
        assert counter.frame_count == 3
    detach_experts(pipe)
    assert torch.equal(case.sample(pipe, **call), before)


@pytest.mark.parametrize("how", HOW)
def test_full_experts_attached_to_a_compiled_pipeline_say_that_they_are_not(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES["wan"]
    pipe, counter = case.build(), CompileCounter()
    folder = full_experts(tmp_path, pipe, PLAN)
    compile_networks(pipe, how, counter)
    logger = logging.getLogger("diffusers.pdmd_core.pipelines.attach")
    logger.addHandler(caplog.handler)
    try:
        attach_experts(pipe, folder)
    finally:
        logger.removeHandler(caplog.handler)
    assert "compile them too, with `for network in pipe.phased.networks: network.compile()`" in caplog.text
    expected = case.sample(pipe)
    assert counter.frame_count == 0
    for network in pipe.phased.networks:
        network.compile(backend=counter)
    assert torch.equal(case.sample(pipe), expected) and counter.frame_count == 1


def test_a_stock_pipeline_on_compiled_experts_is_right_or_an_error(tmp_path: Path) -> None:
    """Outside a phased pipeline the hook is in the graph again."""
    case = CASES["qwen_image"]
    pipe = case.build()
    attach_experts(pipe, lora_experts(tmp_path, pipe, PLAN))
    other = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    call = {**case.call, "image": GIVEN, "num_inference_steps": 4, "true_cfg_scale": 1.0, "output_type": "latent"}

    def sample() -> torch.Tensor:
        return other(**call, strength=1.0, generator=torch.Generator().manual_seed(3), return_dict=False)[0]

    expected, phased, counter = sample(), case.sample(pipe), CompileCounter()
    pipe.transformer.compile(backend=counter)
    for _ in range(2):
        assert torch.equal(case.sample(pipe), phased)
        assert torch.equal(sample(), expected)
    graphs = counter.frame_count
    assert torch.equal(case.sample(pipe), phased) and torch.equal(sample(), expected)
    assert counter.frame_count == graphs
    other.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(RuntimeError, match="another scheduler walks this pipeline"):
        sample()
