"""Calls of phased pipelines: schedulers, steps, guidance, callbacks, errors on the way."""

from __future__ import annotations

import inspect
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxControlPipeline, WanVideoToVideoPipeline
from diffusers.utils import logging as verbosity_of
from torch import nn

from pdmd_core.experts import ExpertsError, PhasedExperts
from pdmd_core.phases import PhasePlan
from pdmd_core.pipelines import attach_experts
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.families.case import Case
from tests.helpers.families.cases import CASES
from tests.helpers.families.flux import flux
from tests.helpers.tiny_pipelines import (
    GIVEN,
    KINDS,
    PLAN,
    THREE,
    euler,
    first_call,
    full_experts,
    lora_experts,
    networks_of,
)


def test_the_scheduler_must_walk_the_plan(kind: str, tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = case.build()
    stock = pipe.scheduler
    attach_experts(pipe, KINDS[kind](tmp_path, pipe, PLAN))
    expected, own = case.sample(pipe), pipe.scheduler
    for other in (stock, PhasedDMDScheduler(), PhasedDMDScheduler.from_plan(THREE)):
        pipe.scheduler = other
        with pytest.raises(ExpertsError, match=r"PhasedDMDScheduler.from_plan\(pipe.phased.plan\)"):
            case.sample(pipe)
    pipe.scheduler = PhasedDMDScheduler.from_plan(pipe.phased.plan)
    assert pipe.scheduler is not own
    assert torch.equal(case.sample(pipe), expected)


def test_a_phased_scheduler_that_is_there_already_stays(kind: str, tmp_path: Path) -> None:
    pipe = CASES["wan"].build()
    folder = KINDS[kind](tmp_path, pipe, PLAN)
    pipe.scheduler = scheduler = PhasedDMDScheduler.from_plan(PLAN, refine=True)
    assert attach_experts(pipe, folder).scheduler is scheduler
    pipe = CASES["wan"].build()
    pipe.scheduler = PhasedDMDScheduler.from_plan(THREE)
    assert attach_experts(pipe, folder).scheduler.plan == PLAN


def test_a_replaced_network_is_no_expert(kind: str, tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = case.build()
    attach_experts(pipe, KINDS[kind](tmp_path, pipe, PLAN))
    pipe.transformer = case.build().transformer
    with pytest.raises(ExpertsError, match=r"pipe.transformer was replaced and is no phased expert"):
        case.sample(pipe)


@pytest.mark.parametrize("name", ["wan", "qwen_image", "flux", "stable_diffusion_3", "z_image"])
def test_another_number_of_steps_names_the_right_one(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    pipe = case.build()
    attach_experts(pipe, full_experts(tmp_path, pipe, PLAN))
    expected = case.sample(pipe)
    with pytest.raises(ValueError, match="distilled for 4 steps, found 50: ask for 4, or allow more with refine=True"):
        case.sample(pipe, num_inference_steps=50)
    assert torch.equal(case.sample(pipe, num_inference_steps=4), expected)


@pytest.mark.parametrize("name", ["wan", "qwen_image", "flux", "stable_diffusion_3", "z_image"])
def test_no_guidance_unless_it_is_asked_for_which_warns(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One forward a step; with guidance, in the way this pipeline takes it, two samples or two forwards."""
    case = CASES[name]
    pipe = case.build()
    attach_experts(pipe, full_experts(tmp_path, pipe, PLAN))
    seen: list[int] = []
    for network in pipe.phased.networks:
        network.register_forward_pre_hook(
            lambda n, a, k: seen.append(len(a[0] if a else k["hidden_states"])) or None, with_kwargs=True
        )
    logging.getLogger("diffusers.pdmd_core.pipelines.phased").addHandler(caplog.handler)
    case.sample(pipe)
    assert sum(seen) == 4 and "guidance in them" not in caplog.text
    seen.clear()
    none = 0.0 if name == "z_image" else 1.0
    argument = "true_cfg_scale" if name in ("qwen_image", "flux") else "guidance_scale"
    case.sample(pipe, **{argument: none})
    assert sum(seen) == 4 and "guidance in them" not in caplog.text
    seen.clear()
    case.sample(pipe, **{argument: 3.0}, negative_prompt="blue")
    assert sum(seen) == 8
    assert re.search(rf"{argument}=3.0: these experts were distilled with the teacher's guidance in them", caplog.text)
    assert f"leave it at {none:g}" in caplog.text
    if name == "wan":  # the level is that of diffusers
        caplog.clear()
        verbosity = verbosity_of.get_verbosity()
        verbosity_of.set_verbosity_error()
        case.sample(pipe, **{argument: 3.0})
        verbosity_of.set_verbosity(verbosity)
        assert not caplog.text
    logging.getLogger("diffusers.pdmd_core.pipelines.phased").removeHandler(caplog.handler)


def test_guidance_of_the_manifest_is_the_default(tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = case.build()
    attach_experts(pipe, full_experts(tmp_path, pipe, PLAN, guidance_scale=2.0))
    assert torch.equal(case.sample(pipe), case.sample(pipe, guidance_scale=2.0))
    assert not torch.equal(case.sample(pipe), case.sample(pipe, guidance_scale=1.0))


def test_the_guidance_input_of_a_guidance_distilled_base_is_left_alone(tmp_path: Path) -> None:
    case = CASES["flux"]
    pipe = flux(guidance_embeds=True)
    attach_experts(pipe, full_experts(tmp_path, pipe, PLAN))
    seen: list[float] = []
    for network in pipe.phased.networks:
        network.register_forward_pre_hook(lambda n, a, k: seen.append(float(k["guidance"])), with_kwargs=True)
    case.sample(pipe)
    case.sample(pipe, guidance_scale=7.0)
    assert seen == [3.5] * 4 + [7.0] * 4


def test_a_scale_that_is_an_input_of_the_network_alone_is_no_guidance(tmp_path: Path) -> None:
    """FluxControlPipeline has no classifier-free guidance, and no other scale to take for it."""
    flux_pipe = flux(guidance_embeds=True)
    config = {**flux_pipe.transformer.config, "in_channels": 32, "out_channels": 16}
    del config["_use_default_values"]
    parts = {**flux_pipe.components, "transformer": type(flux_pipe.transformer).from_config(config).eval()}
    pipe = FluxControlPipeline(**{k: v for k, v in parts.items() if k in FluxControlPipeline.__init__.__annotations__})
    pipe.set_progress_bar_config(disable=True)
    attach_experts(pipe, full_experts(tmp_path, pipe, PLAN))
    seen: list[float] = []
    for network in pipe.phased.networks:
        network.register_forward_pre_hook(lambda n, a, k: seen.append(float(k["guidance"])), with_kwargs=True)
    pipe("a panda", control_image=GIVEN, height=8, width=8, max_sequence_length=16, output_type="latent")
    assert seen == [inspect.signature(FluxControlPipeline.__call__).parameters["guidance_scale"].default] * 4


def test_positional_arguments(tmp_path: Path) -> None:
    case = CASES["qwen_image"]
    pipe = case.build()
    attach_experts(pipe, lora_experts(tmp_path, pipe, PLAN))
    expected = case.sample(pipe)
    call = {k: v for k, v in case.call.items() if k not in ("prompt", "height", "width")}
    noise = {"latents": case.noise(), "output_type": "latent", "return_dict": False}
    height, width, _ = case.size
    assert torch.equal(pipe("a panda", None, 1.0, height, width, 4, **call, **noise)[0], expected)
    with pytest.raises(ValueError, match="found 9: ask for 4"):
        pipe("a panda", None, 1.0, height, width, 9, **call, **noise)
    with pytest.raises(TypeError, match="unexpected keyword argument 'prompts'"):
        case.sample(pipe, prompts="a panda")


def test_callbacks_see_the_phase_of_the_next_step_and_can_interrupt(kind: str, tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = case.build()
    attach_experts(pipe, KINDS[kind](tmp_path, pipe, PLAN))
    expected, seen = case.sample(pipe), []

    def see(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, pipe.scheduler.phase, round(float(timestep))))
        pipe._interrupt = stop == step
        return tensors

    stop = -1
    assert torch.equal(case.sample(pipe, callback_on_step_end=see), expected)
    assert seen == [(0, 0, 1000), (1, 1, 938), (2, 1, 833), (3, 1, 625)]
    stop = 1
    seen.clear()
    assert not torch.equal(case.sample(pipe, callback_on_step_end=see), expected)
    assert [step for step, *_ in seen] == [0, 1]
    assert torch.equal(case.sample(pipe), expected)


def test_an_error_in_the_middle_leaves_a_pipeline_that_runs(kind: str, tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = case.build()
    attach_experts(pipe, KINDS[kind](tmp_path, pipe, PLAN))
    expected = case.sample(pipe)

    def fail(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        case.sample(pipe, callback_on_step_end=fail)
    assert not pipe.phased.running and not pipe.phased.route.switched
    assert torch.equal(case.sample(pipe), expected)


def test_changing_the_dtype_takes_the_experts_along(kind: str, tmp_path: Path) -> None:
    """In bfloat16 timesteps 876.5 and 875 are one; experts still switch by the step."""
    plan = PhasePlan.from_sigmas([[1.0, 0.8765], [0.875, 0.7]])
    case = CASES["wan"]
    folder = KINDS[kind](tmp_path, case.build(), plan)
    pipe = attach_experts(case.build(), PhasedExperts.open(folder)).to(torch.bfloat16)
    for network in pipe.phased.networks or [pipe.transformer]:
        assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    networks = [network.to(torch.bfloat16) for network in networks_of(case, folder)]
    sampled = case.sample(pipe)
    seen = euler_in_bfloat16(case, plan, networks)
    torch.testing.assert_close(sampled.float(), seen, rtol=0, atol=0.1)


def euler_in_bfloat16(case: Case, plan: PhasePlan, networks: list[nn.Module]) -> torch.Tensor:
    """As ``euler``, with network inputs in bfloat16 as the pipeline makes them."""
    args, kwargs = first_call(case)
    kwargs = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    x, sigmas = case.noise(), torch.tensor([*plan.sigmas, 0.0])
    with torch.no_grad():
        for i in range(4):
            velocity = case.velocity(networks[i // 2], args, kwargs, x.bfloat16(), sigmas[i : i + 1] * 1000)
            x = x + (sigmas[i + 1] - sigmas[i]) * velocity.float()
    return x


def test_sigmas_that_a_pipeline_computes_are_only_counted_and_the_user_s_are_checked(tmp_path: Path) -> None:
    """CogView4, LTX and others compute sigmas that are not uniform and give them to the scheduler."""
    case = CASES["qwen_image"]
    pipe = case.build()
    folder = full_experts(tmp_path, pipe, PLAN)
    kind = type(pipe)

    class Computing(kind):
        def __call__(self, *args: Any, sigmas: Any = None, num_inference_steps: int = 50, **kwargs: Any) -> Any:
            sigmas = [1.0, 0.9, 0.5, 0.1][:num_inference_steps] if sigmas is None else sigmas
            return kind.__call__(self, *args, sigmas=sigmas, num_inference_steps=num_inference_steps, **kwargs)

    pipe.__class__ = Computing
    attach_experts(pipe, folder)
    assert torch.equal(case.sample(pipe), euler(case, PLAN, networks_of(case, folder)))
    with pytest.raises(ValueError, match="the sigmas given are not the plan's"):
        case.sample(pipe, sigmas=[1.0, 0.9, 0.5, 0.1])


def test_a_strength_that_leaves_no_step_is_one_line(kind: str, tmp_path: Path) -> None:
    case = CASES["wan"]
    text = case.build()
    pipe = WanVideoToVideoPipeline(**{k: v for k, v in text.components.items() if k != "transformer_2"})
    pipe.set_progress_bar_config(disable=True)
    attach_experts(pipe, KINDS[kind](tmp_path, pipe, PLAN))
    call = {k: v for k, v in case.call.items() if k != "num_frames"}
    with pytest.raises(ExpertsError, match=r"this strength leaves none of the 4 steps: ask for at least 0\.25$"):
        pipe(strength=0.2, latents=case.noise(), output_type="latent", **call)
    assert (
        pipe(strength=0.25, latents=case.noise(), output_type="latent", return_dict=False, **call)[0].isfinite().all()
    )
