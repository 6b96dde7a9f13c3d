"""What users do to MODELs before and after they are composed: LoRAs, hooks, wrappers, guidance, model sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.comfyui.phased_models import TWO, sample, sigmas_of, state
from tests.helpers.comfyui.tiny_models import lora


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_users_lora_after_the_composite_is_on_all_experts(pack, models, composite, build, kind: str) -> None:
    import comfy.sd

    model, experts = build("wan", TWO, kind)
    users = lora("wan", seed=9)
    after, _ = comfy.sd.load_lora_for_models(model, None, users, 0.7, 0.0)
    before = [comfy.sd.load_lora_for_models(expert, None, users, 0.7, 0.0)[0] for expert in experts]
    expected = composite.compose(composite.composite_of(model).plan, [composite.Expert(each) for each in before])
    outputs = [sample(pack, models, each, "wan", sigmas_of(TWO)) for each in (after, expected, model)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(sample(pack, models, after, "wan", sigmas_of(TWO)), outputs[0])


def test_a_lora_hook_on_a_prompt_is_on_all_experts(pack, models, composite, build) -> None:
    import comfy.hooks
    import comfy.sd

    model, experts = build("wan", TWO)
    users, prompt, negative = lora("wan", seed=9), models.conditioning("wan"), models.conditioning("wan", seed=8)
    hooked = comfy.hooks.set_hooks_for_conditioning(prompt, comfy.hooks.create_hook_lora(users, 0.7, 0.0))

    def run(model: Any, positive: Any) -> Tensor:
        (guider,) = pack.call("CFGGuider", model=model, positive=positive, negative=negative, cfg=1.0)
        return sample(pack, models, model, "wan", sigmas_of(TWO), guider=guider)

    before = [comfy.sd.load_lora_for_models(expert, None, users, 0.7, 0.0)[0] for expert in experts]
    expected = composite.compose(composite.composite_of(model).plan, [composite.Expert(each) for each in before])
    plain, states = run(model, prompt), [state(each) for each in (model, *experts)]
    changes = slice(1, None)  # ComfyUI gives the MODEL of a run with hooks a new uuid
    torch.testing.assert_close(run(model, hooked), run(expected, prompt), atol=1e-5, rtol=1e-5)
    assert [state(each) for each in experts] == states[1:] and state(model)[changes] == states[0][changes]
    assert torch.equal(run(model, prompt), plain) and not torch.allclose(run(expected, prompt), plain, atol=1e-3)


def test_every_expert_runs_with_the_hooks_that_were_registered_for_it(pack, models, composite, build) -> None:
    import comfy.hooks
    from comfy.patcher_extension import WrappersMP

    model, experts = build("wan", TWO)
    registered: list[Any] = []

    def watched(patcher: Any) -> Any:
        def wrapper(executor: Any, x: Tensor, sigma: Tensor, options: dict[str, Any], *args: Any) -> Any:
            registered.append(options["registered_hooks"])
            return executor(x, sigma, options, *args)

        clone = patcher.clone()
        clone.add_wrapper(WrappersMP.PREDICT_NOISE, wrapper)
        return clone

    made = composite.compose(composite.composite_of(model).plan, [composite.Expert(watched(each)) for each in experts])
    hook = comfy.hooks.create_hook_lora(lora("wan", seed=9), 0.7, 0.0)
    prompt = comfy.hooks.set_hooks_for_conditioning(models.conditioning("wan"), hook)
    negative = models.conditioning("wan", seed=8)
    (guider,) = pack.call("CFGGuider", model=made, positive=prompt, negative=negative, cfg=1.0)
    sample(pack, models, made, "wan", sigmas_of(TWO), guider=guider)
    assert registered[0] is registered[1] is not registered[2] is registered[3]


def test_guidance_nodes_after_the_composite_are_on_all_experts_and_before_it_on_theirs(
    pack, models, composite, build
) -> None:
    model, experts = build("wan", TWO)
    (after,) = pack.call("CFGZeroStar", model=model)
    zero_star = [pack.call("CFGZeroStar", model=expert)[0] for expert in experts]
    compose, plan = composite.compose, composite.composite_of(model).plan
    both = compose(plan, [composite.Expert(each) for each in zero_star])
    first = compose(plan, [composite.Expert(each) for each in (zero_star[0], experts[1])])
    outputs = [sample(pack, models, each, "wan", sigmas_of(TWO), cfg=3.0) for each in (after, both, first, model)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[2], outputs[3])


def test_a_wrapper_around_one_experts_predictions_stays_with_that_expert(pack, models, composite, build) -> None:
    from comfy.patcher_extension import WrappersMP

    model, experts = build("wan", TWO)
    seen: dict[str, list[float]] = {"first": [], "second": [], "all": []}

    def watched(patcher: Any, name: str) -> Any:
        def wrapper(executor: Any, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen[name].append(round(float(sigma[0]), 4))
            return executor(x, sigma, *args, **kwargs)

        clone = patcher.clone()
        clone.add_wrapper(WrappersMP.PREDICT_NOISE, wrapper)
        return clone

    watching = [watched(experts[0], "first"), watched(experts[1], "second")]
    made = composite.compose(composite.composite_of(model).plan, [composite.Expert(each) for each in watching])
    sample(pack, models, watched(made, "all"), "wan", sigmas_of(TWO))
    assert seen == {"first": [1.0, 0.9375], "second": [0.8333, 0.625], "all": [1.0, 0.9375, 0.8333, 0.625]}


def test_wrappers_and_callbacks_after_the_composite_are_on_every_expert(pack, models, build) -> None:
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    model, experts = build("wan", TWO)
    wrapped, seen, called = model.clone(), [], []

    def wrapper(executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(round(float(t[0]), 3))
        return executor(x, t, *args, **kwargs)

    wrapped.add_wrapper(WrappersMP.DIFFUSION_MODEL, wrapper)
    for kind in (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_CLEANUP):
        wrapped.add_callback(kind, lambda patcher, kind=kind: called.append((kind, patcher.model)))
    sample(pack, models, wrapped, "wan", sigmas_of(TWO))
    assert seen == [1000.0, 937.5, 833.333, 625.0]
    pairs = [("on_pre_run", "on_cleanup")] * 2
    assert [kind for kind, _ in called] == [kind for pair in pairs for kind in pair]
    assert [network for _, network in called] == [each.model for each in experts for _ in range(2)]


@pytest.mark.parametrize(("kind", "steps"), [("full", [1.0, 0.9375]), ("lora", [1.0, 0.9375, 0.8333, 0.625])])
def test_compiled_blocks_of_one_network_do_not_run_in_anothers_place(pack, models, build, kind: str, steps) -> None:
    """What torch.compile nodes put on the MODEL after it was made is for the first expert's network."""
    from comfy.patcher_extension import WrappersMP

    compiled, seen = build("wan", TWO, kind)[0].clone(), []

    def wrapper(executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(round(float(t[0]), 4))
        return executor(x, t, *args, **kwargs)

    compiled.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "torch.compile", wrapper)
    sample(pack, models, compiled, "wan", sigmas_of(TWO))
    assert seen == steps


def test_model_sampling_set_after_the_composite_is_on_every_expert(pack, models, composite, build) -> None:
    import comfy.model_sampling

    class Half(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
            return super().calculate_denoised(sigma, output, x) / 2

    model, experts = build("wan", TWO)

    def patched(each: Any) -> Any:
        clone, sampling = each.clone(), Half(each.model.model_config)
        sampling.set_parameters(shift=5.0, timesteps=1000, multiplier=1000)
        clone.add_object_patch("model_sampling", sampling)
        return clone

    plan = composite.composite_of(model).plan
    expected = composite.compose(plan, [composite.Expert(patched(each)) for each in experts])
    assert type(expected.get_model_object("model_sampling")) is Half  # of another kind: the shift is left to it
    outputs = [sample(pack, models, each, "wan", sigmas_of(TWO)) for each in (patched(model), expected, model)]
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2], atol=1e-2)


def test_the_shift_keeps_what_else_the_model_says_of_sampling(pack, models, composite) -> None:
    plan, wan = pack.module("pdmd_core.phases").PhasePlan.from_steps([2, 2], shift=5.0), models.wan()
    sampling = wan.get_model_object("model_sampling")
    scaled = hasattr(sampling, "noise_scale")  # newer versions of ComfyUI
    if scaled:
        sampling.set_noise_scale(8.0)
    found = composite.compose(plan, [composite.Expert(wan)] * 2).get_model_object("model_sampling")
    assert found is not sampling and (found.shift, found.multiplier) == (5.0, sampling.multiplier)
    assert not scaled or found.noise_scale == 8.0
