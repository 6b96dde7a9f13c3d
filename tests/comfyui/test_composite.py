"""The composite MODEL inside the real ComfyUI: same numbers as hand-written loops and as wiring by hand."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from pdmd_core.phases import PhasePlan
from tests.helpers.comfyui.phased_models import PLANS, SEED, TWO, noise_of, sample, sigmas_of

FAMILIES = ["wan", "qwen"]


def euler_by_hand(
    experts: list[Any], plan: PhasePlan, x: Tensor, context: Tensor, negative: Tensor, cfgs: list[float]
) -> Tensor:
    """x <- x + (next - sigma) (x - x0) / sigma, with the network of the expert whose phase it is."""
    import comfy.model_management

    steps = [(k, sigma) for k, phase in enumerate(plan.phases) for sigma in phase.sigmas]
    following = [sigma for _, sigma in steps[1:]] + [0.0]
    for (k, sigma), after in zip(steps, following, strict=True):
        comfy.model_management.load_models_gpu([experts[k]])
        network, t = experts[k].model, torch.tensor([sigma] * len(x))
        with torch.no_grad():
            x0 = network.apply_model(x, t, c_crossattn=context)
            if cfgs[k] != 1:
                without = network.apply_model(x, t, c_crossattn=negative)
                x0 = without + (x0 - without) * cfgs[k]
        sigma, after = torch.tensor(sigma), torch.tensor(after)
        x = x + (x - x0) / sigma * (after - sigma)
    return experts[0].model.process_latent_out(x.float())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_one_run_equals_a_hand_written_euler_loop(pack, models, build, family: str, kind: str, plan: PhasePlan) -> None:
    model, experts = build(family, plan, kind)
    found = sample(pack, models, model, family, sigmas_of(plan))
    context = models.conditioning(family)[0][0]
    expected = euler_by_hand(experts, plan, noise_of(models.latent(family)), context, context, [1.0] * len(plan))
    assert torch.equal(found, expected)
    alone = sample(pack, models, experts[0], family, sigmas_of(plan))
    assert (alone - found).abs().max() > 1e-3  # the other experts do make a difference


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_runs_with_its_own_cfg(pack, models, build, family: str) -> None:
    plan, cfgs = PLANS["three experts"], [3.5, 1.0, 2.0]
    model, experts = build(family, plan, "lora", [3.5, None, 2.0])
    context, negative = (models.conditioning(family, seed=seed)[0][0] for seed in (7, 8))
    expected = euler_by_hand(experts, plan, noise_of(models.latent(family)), context, negative, cfgs)
    found = sample(pack, models, model, family, sigmas_of(plan))
    # ComfyUI puts both prompts into one batch, which rounds differently
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert (found - sample(pack, models, build(family, plan, "lora")[0], family, sigmas_of(plan))).abs().max() > 1e-3


def advanced(pack: Any, models: Any, model: Any, family: str, start: int, end: int, latent: dict[str, Tensor]) -> Any:
    """KSamplerAdvanced on steps start..end of 4, with ``simple``."""
    (output,) = pack.call(
        "KSamplerAdvanced",
        model=model,
        add_noise="enable" if start == 0 else "disable",
        noise_seed=SEED,
        steps=4,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        positive=models.conditioning(family),
        negative=models.conditioning(family, seed=8),
        latent_image=latent,
        start_at_step=start,
        end_at_step=end,
        return_with_leftover_noise="enable" if end < 4 else "disable",
    )
    return output


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_partial_runs_equal_two_samplers_wired_by_hand_and_one_run_differs_by_their_hand_over(
    pack, models, build, family: str, kind: str
) -> None:
    model, experts = build(family, TWO, kind)
    shifted = [pack.call("ModelSamplingSD3", model=expert, shift=5.0)[0] for expert in experts]
    if family == "qwen":
        shifted = [pack.call("ModelSamplingAuraFlow", model=expert, shift=5.0)[0] for expert in experts]
    empty = models.latent(family)
    by_hand = advanced(pack, models, shifted[1], family, 2, 4, advanced(pack, models, shifted[0], family, 0, 2, empty))
    parts = advanced(pack, models, model, family, 2, 4, advanced(pack, models, model, family, 0, 2, empty))
    whole = advanced(pack, models, model, family, 0, 4, empty)
    assert torch.equal(parts["samples"], by_hand["samples"])
    # The two-sampler pattern divides by 1 - sigma and multiplies again where it hands over. What that costs is measured
    # where nothing is handed over: one network, in one run and in two.
    one = advanced(pack, models, shifted[0], family, 0, 4, empty)["samples"]
    split = advanced(pack, models, shifted[0], family, 2, 4, advanced(pack, models, shifted[0], family, 0, 2, empty))
    round_trip = (one - split["samples"]).abs().max()
    assert round_trip < 1e-4
    assert (whole["samples"] - by_hand["samples"]).abs().max() <= 4 * round_trip + 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_ksampler_with_simple_takes_the_steps_of_the_plan(pack, models, build, family: str) -> None:
    import comfy.samplers

    model, experts = build(family, TWO)
    sampling = model.get_model_object("model_sampling")
    torch.testing.assert_close(
        comfy.samplers.calculate_sigmas(sampling, "simple", 4), sigmas_of(TWO), atol=1e-6, rtol=1e-6
    )
    positive, negative = models.conditioning(family), models.conditioning(family, seed=8)
    common = {"seed": SEED, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    common |= {"positive": positive, "negative": negative, "latent_image": models.latent(family)}
    (found,) = pack.call("KSampler", model=model, steps=4, denoise=1.0, **common)
    torch.testing.assert_close(found["samples"], sample(pack, models, model, family, sigmas_of(TWO)), atol=1e-5, rtol=0)
    # denoise 0.5 of two steps are the two last steps of four: the second expert's alone
    image = {"samples": torch.randn(models.latent(family)["samples"].shape)}
    node = "ModelSamplingSD3" if family == "wan" else "ModelSamplingAuraFlow"
    (low,) = pack.call(node, model=experts[1], shift=5.0)
    partly = {**common, "latent_image": image}
    (found,) = pack.call("KSampler", model=model, steps=2, denoise=0.5, **partly)
    (expected,) = pack.call("KSampler", model=low, steps=2, denoise=0.5, **partly)
    assert torch.equal(found["samples"], expected["samples"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [[1, 2], [2, 4], [3, 2, 2], [4, 7]])
def test_simple_is_exact_for_any_number_of_steps(pack, composite, models, family: str, steps: list[int]) -> None:
    import comfy.samplers

    plan = pack.module("pdmd_core.phases").PhasePlan.from_steps(steps, shift=5.0)
    model = composite.compose(plan, [composite.Expert(models.load(family)) for _ in steps])
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", sum(steps))
    assert [plan.phase_index(float(sigma)) for sigma in sigmas[:-1]] == [
        k for k, n in enumerate(steps) for _ in range(n)
    ]
    torch.testing.assert_close(sigmas, sigmas_of(plan), atol=1e-6, rtol=1e-6)


def routed_by_hand(experts: list[Any], boundary: float) -> Any:
    """Another way to the same: the first MODEL calls the second one's network below the boundary."""
    import comfy.model_management

    def call(apply_model: Any, arguments: dict[str, Any]) -> Tensor:
        sigma = float(arguments["timestep"][0])
        if sigma > boundary * 1.0001:
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
        comfy.model_management.load_models_gpu([experts[1]])
        return experts[1].model.apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model = experts[0].clone()
    model.set_model_unet_function_wrapper(call)
    return model


SAMPLERS = [
    "heun",
    "euler_cfg_pp",
    "dpm_2",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "uni_pc",
    "lms",
    "res_multistep",
    "deis",
    "lcm",
]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_keeps_its_history_across_the_switch(pack, models, build, sampler: str) -> None:
    model, experts = build("wan", TWO)
    sigmas = sigmas_of(TWO.refined(8))
    found = sample(pack, models, model, "wan", sigmas, sampler)
    (by_hand,) = pack.call("ModelSamplingSD3", model=routed_by_hand(experts, TWO.boundaries[0]), shift=5.0)
    expected = sample(pack, models, by_hand, "wan", sigmas, sampler)
    assert torch.equal(found, expected)
    assert torch.isfinite(found).all()


def test_every_other_sampler_of_this_comfyui_runs(pack, models, build) -> None:
    import comfy.samplers

    model, _ = build("wan", TWO, "lora")
    for sampler in sorted(set(comfy.samplers.SAMPLER_NAMES) - set(SAMPLERS)):
        assert torch.isfinite(sample(pack, models, model, "wan", sigmas_of(TWO), sampler)).all(), sampler


@pytest.mark.parametrize("family", FAMILIES)
def test_inpaint_masks_and_batches(pack, models, build, family: str) -> None:
    model, experts = build(family, TWO)
    by_hand = routed_by_hand(experts, TWO.boundaries[0])
    latent = models.latent(family, batch=3)
    latent["samples"] = torch.randn(latent["samples"].shape)
    latent["noise_mask"] = torch.zeros(latent["samples"].shape[-2:]).unsqueeze(0)
    latent["noise_mask"][:, : latent["noise_mask"].shape[1] // 2] = 1
    outputs = [sample(pack, models, each, family, sigmas_of(TWO), latent=latent) for each in (model, by_hand)]
    assert torch.equal(*outputs)
    kept = latent["noise_mask"][0] == 0
    torch.testing.assert_close(outputs[0][..., kept], latent["samples"][..., kept], atol=1e-5, rtol=0)
    assert (outputs[0] - latent["samples"])[..., ~kept].abs().mean() > 0.1


def test_two_composites_in_one_graph(pack, models, build) -> None:
    first, _ = build("wan", TWO)
    second, _ = build("qwen", PLANS["three experts"], "lora")
    inputs = [(first, "wan", sigmas_of(TWO)), (second, "qwen", sigmas_of(PLANS["three experts"]))]
    alone = [sample(pack, models, *each) for each in inputs]
    again = [sample(pack, models, *each) for each in (*inputs, *inputs)]
    assert all(torch.equal(a, b) for a, b in zip(again, [*alone, *alone], strict=True))


def test_one_run_reports_one_progress(pack, models, build) -> None:
    import comfy.samplers

    model, _ = build("wan", TWO)
    positive, negative = models.conditioning("wan"), models.conditioning("wan", seed=8)
    (guider,) = pack.call("CFGGuider", model=model, positive=positive, negative=negative, cfg=1.0)
    latent, seen = models.latent("wan")["samples"], []
    guider.sample(
        noise_of({"samples": latent}),
        latent,
        comfy.samplers.sampler_object("euler"),
        sigmas_of(TWO),
        callback=lambda step, x0, x, total: seen.append((step, total, tuple(x0.shape))),
    )
    assert seen == [(step, 4, tuple(latent.shape)) for step in range(4)]


def test_a_step_at_zero_belongs_to_the_last_expert(composite, build) -> None:
    """No sampler of ComfyUI predicts there now; others may."""
    from types import SimpleNamespace

    model, _ = build("wan", TWO)
    guider = SimpleNamespace(model_patcher=model, model_options={})
    run = composite.Run(guider, composite.composite_of(model), [1.0, 0.0])
    assert [run.index(sigma) for sigma in (0.0, 1e-4, 5 / 6, 0.84, 1.0, 1.4)] == [1, 1, 1, 0, 0, 0]


def test_a_model_without_its_attachment_is_the_first_expert(pack, models, build) -> None:
    model, experts = build("wan", TWO)
    plain = model.clone()
    plain.remove_attachments(pack.module("comfy_nodes.composite").KEY)
    outputs = [sample(pack, models, each, "wan", sigmas_of(TWO)) for each in (plain, experts[0])]
    assert torch.equal(*outputs)


def test_experts_of_different_precision_make_one_model(pack, models, build, composite) -> None:
    import comfy.sd

    model, (high, low) = build("wan", TWO)
    config = {
        key: value
        for key, value in low.model.model_config.unet_config.items()
        if isinstance(value, str | int | float | bool | list | tuple)
    }
    small = comfy.sd.load_diffusion_model_state_dict(
        {name: value.clone() for name, value in low.model.diffusion_model.state_dict().items()},
        model_options={"dtype": torch.float8_e4m3fn},
        metadata={"config": json.dumps({"transformer": config})},
    )
    mixed = composite.compose(composite.composite_of(model).plan, [composite.Expert(each) for each in (high, small)])
    found, exact = (sample(pack, models, each, "wan", sigmas_of(TWO)) for each in (mixed, model))
    assert 0 < (found - exact).norm() < 0.3 * exact.norm()


def test_errors_are_in_words(pack, models, composite, build) -> None:
    import comfy.model_sampling

    phases, errors = pack.module("pdmd_core.phases"), pack.module("comfy_nodes.errors")
    plan = phases.PhasePlan.from_steps([2, 2], shift=5.0)
    wan, qwen, made = models.wan(), models.qwen(), build("wan", TWO)[0]

    class Epsilon(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
        pass

    not_flow = wan.clone()
    not_flow.add_object_patch("model_sampling", Epsilon())
    cases = [
        ([wan], "2 phase(s) (high_noise, low_noise), found 1 MODEL"),
        ([wan, qwen], "of one architecture, found WAN21 (…) for high_noise and QwenImage"),
        ([made, wan], "high_noise already carries phased experts"),
        ([wan, not_flow], "low_noise is a WAN21, which is not a flow matching model"),
        ([wan, models.wan(num_layers=1)], "found WAN21 (…num_layers 2…) for high_noise and WAN21 (…num_layers 1"),
    ]
    for experts, message in cases:
        with pytest.raises(errors.NodeError, match=re.escape(message).replace("…", ".+")):
            composite.compose(plan, [composite.Expert(expert) for expert in experts])
    for cfg in (-1.0, 100.5, float("nan")):
        with pytest.raises(errors.NodeError, match=f"cfg is a number from 0 to 100, found {cfg} for expert low_noise"):
            composite.compose(plan, [composite.Expert(wan), composite.Expert(wan, cfg)])
    several = made.clone()
    several.set_additional_models("multigpu", [wan])
    with pytest.raises(errors.NodeError, match="phased experts run on one GPU: take the multi-GPU node out"):
        sample(pack, models, several, "wan", sigmas_of(TWO))
    guided, _ = build("wan", TWO, cfgs=[3.0, None])
    (guider,) = pack.call("BasicGuider", model=guided, conditioning=models.conditioning("wan"))
    with pytest.raises(errors.NodeError, match="high_noise has cfg 3, which needs negative conditioning"):
        sample(pack, models, guided, "wan", sigmas_of(TWO), guider=guider)
    positive, negative = models.conditioning("wan"), models.conditioning("wan", seed=8)
    (guider,) = pack.call(
        "DualCFGGuider",
        model=guided,
        cond1=positive,
        cond2=negative,
        negative=negative,
        cfg_conds=2.0,
        cfg_cond2_negative=2.0,
        style="regular",
    )
    with pytest.raises(errors.NodeError, match="Guider_DualCFG has no single cfg to set"):
        sample(pack, models, guided, "wan", sigmas_of(TWO), guider=guider)
