"""What phased pipelines sample, against sampling loops by hand over stock networks."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from pdmd_core.experts import PhasedExperts
from pdmd_core.families import family
from pdmd_core.phases import PhasePlan
from pdmd_core.pipelines import attach_experts, detach_experts, load_phased_pipeline
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.families.case import Case
from tests.helpers.families.cases import CASES
from tests.helpers.families.qwen_image import qwen_image_to_image
from tests.helpers.tiny import randn
from tests.helpers.tiny_pipelines import (
    GIVEN,
    PLAN,
    THREE,
    components_of,
    euler,
    first_call,
    full_experts,
    lora_experts,
    networks_of,
)

ON_BOUNDARY = PhasePlan.from_steps([2, 2], shift=7.0)
"""[1, .9545 | .875, .7]: the low-noise expert starts exactly where Wan 2.2's own boundary_ratio lies."""
SECOND = "transformer_2"


def experts(case: Case, kind: str, plan: PhasePlan, folder: Path, **changes: Any) -> Path:
    if kind == "lora":
        pipe = case.build()
        return lora_experts(folder, pipe, plan, components_of(pipe, plan), **changes)
    return full_experts(folder, case.build(), plan, **changes)


def phased(case: Case, folder: Path) -> DiffusionPipeline:
    return attach_experts(case.build(), PhasedExperts.open(folder))


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.velocity])
def test_every_pipeline_samples_what_a_loop_by_hand_samples(name: str, kind: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = experts(case, kind, PLAN, tmp_path)
    networks = networks_of(case, folder)
    expected = euler(case, PLAN, networks)
    assert torch.equal(case.sample(phased(case, folder)), expected)
    assert (euler(case, PLAN, networks[::-1]) - expected).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["wan", "flux", "z_image"])
def test_three_experts(name: str, kind: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = experts(case, kind, THREE, tmp_path)
    first, second, third = networks_of(case, folder)
    expected = euler(case, THREE, [first, second, third])
    pipe = phased(case, folder)
    for _ in range(2):
        assert torch.equal(case.sample(pipe), expected)
    for wrong in ([first, third, second], [first, first, third], [first, second, second]):
        assert (euler(case, THREE, wrong) - expected).abs().max() > 0.1


def test_three_lora_experts_over_the_two_networks_of_wan_2_2(tmp_path: Path) -> None:
    case = CASES["wan_two"]
    folder = lora_experts(tmp_path, case.build(), THREE, ["transformer", SECOND, SECOND])
    assert torch.equal(case.sample(phased(case, folder)), euler(case, THREE, networks_of(case, folder)))


def test_three_full_experts_take_the_place_of_both_networks_of_wan_2_2(tmp_path: Path) -> None:
    case = CASES["wan_two"]
    folder = full_experts(tmp_path, case.build(), THREE)
    assert torch.equal(case.sample(phased(case, folder)), euler(case, THREE, networks_of(case, folder)))


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["wan", "wan_two"])
def test_a_step_exactly_on_the_boundary_goes_to_the_later_expert(name: str, kind: str, tmp_path: Path) -> None:
    case = CASES[name]
    assert ON_BOUNDARY.boundaries == (0.875,)
    folder = experts(case, kind, ON_BOUNDARY, tmp_path)
    networks = networks_of(case, folder)
    sampled = case.sample(phased(case, folder))
    assert torch.equal(sampled, euler(case, ON_BOUNDARY, networks))
    late = PhasePlan.from_sigmas([ON_BOUNDARY.sigmas[:3], ON_BOUNDARY.sigmas[3:]])
    assert (sampled - euler(case, late, networks)).abs().max() > 0.1


def test_one_expert_for_all_noise(tmp_path: Path) -> None:
    plan, case = PhasePlan.from_steps([3], shift=3.0), CASES["wan"]
    for kind in ("lora", "full"):
        folder = experts(case, kind, plan, tmp_path / kind)
        assert torch.equal(case.sample(phased(case, folder)), euler(case, plan, networks_of(case, folder)))
    two = attach_experts(CASES["wan_two"].build(), PhasedExperts.open(folder))
    assert two.transformer_2 is None
    assert torch.equal(case.sample(two), euler(case, plan, networks_of(case, folder)))


@pytest.mark.parametrize("plan", [PLAN, PhasePlan.from_steps([4], shift=5.0)], ids=["two phases", "one phase"])
@pytest.mark.parametrize("component", ["transformer", SECOND])
def test_lora_experts_of_one_network_of_wan_2_2_run_all_steps_on_it(
    component: str, plan: PhasePlan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The other network has no turn; it is there again after saving, loading and detaching."""
    case = CASES["wan_two"]
    stock = case.build()
    stock.save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    folder = lora_experts(tmp_path / "experts", stock, plan, [component] * len(plan), base=base)
    expected = euler(case, plan, networks_of(case, folder))
    logging.getLogger("diffusers.pdmd_core.pipelines.attach").addHandler(caplog.handler)
    pipe = phased(case, folder)
    assert "these experts were distilled for one network, this WanPipeline has two: its " + component in caplog.text
    assert torch.equal(case.sample(pipe), expected)
    pipe.save_pretrained(tmp_path / "saved")
    assert pipe.transformer_2 is None and torch.equal(case.sample(pipe), expected)
    caplog.clear()
    for again in (load_phased_pipeline(folder), load_phased_pipeline(tmp_path / "saved")):
        again.set_progress_bar_config(disable=True)
        torch.testing.assert_close(case.sample(again), expected, rtol=0, atol=1e-5)
    assert "has two" not in caplog.text, "the base that the experts name is right"
    logging.getLogger("diffusers.pdmd_core.pipelines.attach").removeHandler(caplog.handler)
    pipe.to(torch.float64)
    detach_experts(pipe)
    for name in ("transformer", SECOND):
        weights, own = getattr(pipe, name).state_dict(), getattr(stock, name).state_dict()
        assert weights.keys() == own.keys()
        assert all(torch.equal(weights[key], own[key].to(weights[key])) for key in own)
        assert weights["proj_out.weight"].dtype == torch.float64


def test_alpha_counts_as_in_the_formula_of_lora(tmp_path: Path) -> None:
    """W + alpha / rank * B A, merged by hand; merging rounds differently."""
    case = CASES["wan"]
    folder = lora_experts(tmp_path, case.build(), PLAN)
    opened, names, networks = PhasedExperts.open(folder), family("wan"), []
    for phase in PLAN.phases:
        network, tensors = case.build().transformer, opened.tensors(phase.name)
        for name, module in network.named_modules():
            key = (
                f"diffusion_model.{names.native_module_name(name)}"
                if name.endswith(("to_q", "to_v", "to_out.0"))
                else ""
            )
            if f"{key}.alpha" in tensors:
                up, down = tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
                module.weight.data += float(tensors[f"{key}.alpha"]) / len(down) * up @ down
        networks.append(network)
    torch.testing.assert_close(case.sample(phased(case, folder)), euler(case, PLAN, networks), rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize(("strength", "start"), [(1.0, 0), (0.75, 1), (0.5, 2), (0.25, 3)])
def test_image_to_image_starts_midway(strength: float, start: int, kind: str, tmp_path: Path) -> None:
    text = CASES["qwen_image"]
    case, (height, width, _) = replace(text, build=qwen_image_to_image), text.size
    folder = experts(text, kind, PLAN, tmp_path)
    pipe = phased(case, folder)
    call = {**text.call, "image": GIVEN, "strength": strength, "output_type": "latent", "return_dict": False}
    seen: list[int] = []

    def see(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(pipe.scheduler.phase)
        return tensors

    sampled = pipe(**call, generator=torch.Generator().manual_seed(11), callback_on_step_end=see)[0]
    generator = torch.Generator().manual_seed(11)  # the pipeline draws the picture's latents first, then noise
    pixels, shape = pipe.image_processor.preprocess(GIVEN, height, width).unsqueeze(2), (1, 4, height // 4, width // 4)
    with torch.no_grad():
        clean = pipe._pack_latents(pipe._encode_vae_image(pixels, generator), *shape)
    noise = pipe._pack_latents(torch.randn(1, *shape, generator=generator), *shape)
    sigma = torch.tensor(PLAN.sigmas)[start]
    x = (1 - sigma) * clean + sigma * noise
    assert torch.equal(sampled, euler(text, PLAN, networks_of(text, folder), x, start))
    assert seen == [0, 1, 1, 1][start:]  # after each step, the phase of the next


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_pipeline_that_does_not_say_where_it_starts(kind: str, tmp_path: Path) -> None:
    """WanVideoToVideoPipeline slices the timesteps without set_begin_index."""
    case = CASES["wan"]
    folder = experts(case, kind, PLAN, tmp_path)
    text = case.build()
    pipe = diffusers.WanVideoToVideoPipeline(**{k: v for k, v in text.components.items() if k != "transformer_2"})
    pipe.set_progress_bar_config(disable=True)
    attach_experts(pipe, PhasedExperts.open(folder))
    x = randn(*case.latents, seed=9)
    call = {k: v for k, v in case.call.items() if k != "num_frames"}
    sampled = pipe(strength=0.5, latents=x, output_type="latent", return_dict=False, **call)[0]
    assert torch.equal(sampled, euler(case, PLAN, networks_of(case, folder), x, start=2))


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["wan", "qwen_image", "stable_diffusion_3"])
def test_batches_equal_single_samples(name: str, kind: str, tmp_path: Path) -> None:
    """Several prompts and several samples of each; kernels round differently for other batch sizes."""
    case = CASES[name]
    pipe = phased(case, experts(case, kind, PLAN, tmp_path))
    prompts = ["a panda", "a zebra"]
    many = "num_videos_per_prompt" if "wan" in name else "num_images_per_prompt"
    noise = randn(4, *case.latents[1:], seed=8)
    batch = case.sample(pipe, prompt=prompts, latents=noise, **{many: 2})
    single = [case.sample(pipe, prompt=prompts[i // 2], latents=noise[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(batch, torch.cat(single), rtol=0, atol=1e-4)
    assert (batch[0] - batch[1]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_refined_steps_stay_with_their_experts(kind: str, tmp_path: Path) -> None:
    case = CASES["wan"]
    folder = experts(case, kind, ON_BOUNDARY, tmp_path)
    pipe = phased(case, folder)
    pipe.scheduler = PhasedDMDScheduler.from_plan(ON_BOUNDARY, refine=True)
    assert torch.equal(case.sample(pipe), euler(case, ON_BOUNDARY, networks_of(case, folder)))
    for steps in (7, 40):
        expected = euler(case, ON_BOUNDARY.refined(steps), networks_of(case, folder))
        assert torch.equal(case.sample(pipe, num_inference_steps=steps), expected)


def test_renoising_takes_the_experts_of_the_phases(tmp_path: Path) -> None:
    case = CASES["wan"]
    folder = experts(case, "full", PLAN, tmp_path)
    pipe = phased(case, folder)
    pipe.scheduler = PhasedDMDScheduler.from_plan(PLAN, sampler="renoise", renoise_seed=4)
    scheduler, networks = (
        PhasedDMDScheduler.from_plan(PLAN, sampler="renoise", renoise_seed=4),
        networks_of(case, folder),
    )

    (args, kwargs), x = first_call(case), case.noise()
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for i, timestep in enumerate(scheduler.timesteps):
            velocity = case.velocity(networks[i // 2], args, kwargs, x, timestep.expand(1))
            x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
    assert torch.equal(case.sample(pipe), x)
