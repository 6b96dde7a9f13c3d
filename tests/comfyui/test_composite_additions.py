"""What third-party nodes do to a composed MODEL: on all experts, refused, or begun anew; never on the first alone."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor

from pdmd_core.phases import PhasePlan
from tests.helpers.comfyui.phased_models import TWO, sample, sigmas_of
from tests.helpers.comfyui.tiny_models import lora, save_lora

LONG = PhasePlan.from_steps([6, 6], shift=5.0)
PLACE = "diffusion_model.blocks.0.cross_attn"


def attention_patched(model: Any, factor: float) -> Any:
    """As guidance nodes do: a method of the attention, bound to it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return type(self).forward(self, *args, **kwargs) * factor

    clone = model.clone()
    attention = clone.get_model_object(PLACE)
    clone.add_object_patch(f"{PLACE}.forward", types.MethodType(forward, attention))
    return clone


def attention_closed_over(model: Any, factor: float) -> Any:
    """As others do: a function that remembers the attention's own method."""
    clone = model.clone()
    before = clone.get_model_object(f"{PLACE}.forward")
    clone.add_object_patch(f"{PLACE}.forward", lambda *args, **kwargs: before(*args, **kwargs) * factor)
    return clone


def injected(model: Any, factor: float) -> Any:
    from comfy.model_patcher import PatcherInjection

    def scale(by: float) -> Any:
        def apply(patcher: Any) -> None:
            with torch.no_grad():
                patcher.model.diffusion_model.head.head.weight.mul_(by)  # exact and so is its inverse, for powers of 2

        return apply

    clone = model.clone()
    clone.set_injections("tests", [PatcherInjection(inject=scale(factor), eject=scale(1 / factor))])
    return clone


def weight_wrapped(model: Any, factor: float) -> Any:
    clone = model.clone()
    clone.add_weight_wrapper(f"{PLACE}.v.weight", lambda weight: weight * factor)
    return clone


def computed_in(pack: Any) -> Any:
    return lambda model, dtype: pack.call("ModelComputeDtype", model=model, dtype=dtype)[0]


def composed_after(composite: Any, model: Any, experts: list[Any]) -> Any:
    return composite.compose(composite.composite_of(model).plan, [composite.Expert(each) for each in experts])


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    ("change", "value"),
    [(attention_patched, 1.5), (injected, 2.0), (weight_wrapped, 1.5), ("compute dtype", "bf16")],
)
def test_what_is_put_on_the_model_afterwards_is_on_all_experts(
    pack, models, composite, build, kind: str, change: Any, value: Any
) -> None:
    change = computed_in(pack) if change == "compute dtype" else change
    model, experts = build("wan", TWO, kind)
    plain = sample(pack, models, model, "wan", sigmas_of(TWO))
    expected = composed_after(composite, model, [change(each, value) for each in experts])
    first_only = composed_after(composite, model, [change(experts[0], value), *experts[1:]])
    outputs = [sample(pack, models, each, "wan", sigmas_of(TWO)) for each in (change(model, value), expected)]
    assert torch.equal(*outputs)
    assert (outputs[0] - plain).abs().max() > 1e-3
    assert (outputs[0] - sample(pack, models, first_only, "wan", sigmas_of(TWO))).abs().max() > 1e-3
    assert torch.equal(sample(pack, models, model, "wan", sigmas_of(TWO)), plain)


def with_bypass_lora(pack: Any, model: Any) -> Any:
    return pack.call("LoraLoaderBypassModelOnly", model=model, lora_name="bypass.safetensors", strength_model=1.0)[0]


def test_what_remembers_the_first_network_is_shared_by_loras_and_refused_for_networks(
    pack, models, composite, build, base
) -> None:
    import nodes

    save_lora(base / "models/loras/bypass.safetensors", lora("wan", 3))
    changes = {f"the patch of '{PLACE}.forward'": lambda model: attention_closed_over(model, 1.5)}
    if "LoraLoaderBypassModelOnly" in nodes.NODE_CLASS_MAPPINGS:
        changes["the injection 'bypass_lora'"] = lambda model: with_bypass_lora(pack, model)
    ran: list[int] = []
    for what, change in changes.items():
        model, experts = build("wan", TWO, "lora")
        before = composed_after(composite, model, [change(each) for each in experts])
        outputs = [sample(pack, models, each, "wan", sigmas_of(TWO)) for each in (change(model), before, model)]
        assert torch.equal(*outputs[:2]) and (outputs[0] - outputs[2]).abs().max() > 1e-3
        model, experts = build("wan", TWO)
        model.add_wrapper("diffusion_model", lambda executor, *args, **kwargs: ran.append(1))
        with pytest.raises(pack.module("comfy_nodes.errors").NodeError) as caught:
            sample(pack, models, change(model), "wan", sigmas_of(TWO))
        assert f"{what} was made for the first expert's network" in str(caught.value)
        assert "expert low_noise: put the node that makes it before Phased Experts" in str(caught.value)
        assert not ran  # said before any step


def test_a_compile_node_afterwards_compiles_every_network(pack, models, composite, build) -> None:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    runs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            runs.append(1)
            return graph.forward(*args)

        return run

    model, _ = build("wan", TWO)
    expected = sample(pack, models, model, "wan", sigmas_of(TWO))
    for keys in (["diffusion_model"], ["diffusion_model.blocks.0", "diffusion_model.blocks.1"]):
        compiled = model.clone()
        set_torch_compile_wrapper(compiled, backend=backend, keys=keys)
        runs.clear()
        sample(pack, models, compiled, "wan", sigmas_of(TWO)[:3])
        of_the_first = len(runs)
        runs.clear()
        found = sample(pack, models, compiled, "wan", sigmas_of(TWO))
        assert len(runs) == 2 * of_the_first > 0
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_merging_and_saving_a_composed_model_are_refused(pack, models, build, tmp_path) -> None:
    import nodes

    error = pack.module("comfy_nodes.errors").NodeError
    (first, _), (second, _), plain = build("wan", TWO), build("wan", TWO, "lora"), models.wan(7)
    for node, inputs in {
        "ModelMergeSimple": {"ratio": 0.5},
        "ModelMergeAdd": {},
        "ModelMergeSubtract": {"multiplier": 1.0},
    }.items():
        for one in (first, plain):
            with pytest.raises(error, match="merge the MODEL of each expert before Phased Experts"):
                pack.call(node, model1=one, model2=second.clone(), **inputs)
    saver = nodes.NODE_CLASS_MAPPINGS["ModelSave"]()
    saver.output_dir = str(tmp_path)
    (merged,) = pack.call("ModelMergeSimple", model1=first, model2=plain, ratio=0.5)
    for model in (first, merged):
        with pytest.raises(error, match=r"carries phased experts \(high_noise, low_noise\), and this file holds one"):
            saver.save(model, "saved")
    with pytest.raises(error, match="this file holds one network"):
        merged.model_state_dict(filter_prefix="diffusion_model.")
    with pytest.raises(error, match="this file holds one network"):  # as old versions of ComfyUI save
        merged.partially_load(torch.device("cpu"), 0, force_patch_weights=True)
    assert len(merged.model_state_dict()) == len(plain.model_state_dict())
    assert not list(tmp_path.iterdir())


def test_a_plain_model_is_merged_into_every_expert(pack, models, composite, build) -> None:
    model, experts = build("wan", TWO)
    plain = models.wan(7)
    merge = {"model2": plain, "ratio": 0.5}
    (after,) = pack.call("ModelMergeSimple", model1=model, **merge)
    before = [pack.call("ModelMergeSimple", model1=each, **merge)[0] for each in experts]
    outputs = [
        sample(pack, models, each, "wan", sigmas_of(TWO)) for each in (after, composed_after(composite, model, before))
    ]
    assert torch.equal(*outputs)


def test_guiders_that_run_a_second_model_are_refused(pack, models, build) -> None:
    import nodes

    if "DualModelGuider" not in nodes.NODE_CLASS_MAPPINGS:
        pytest.skip("this version of ComfyUI has no DualModelGuider")
    (model, _), plain = build("wan", TWO), models.wan(7)
    prompts = {"positive": models.conditioning("wan"), "negative": models.conditioning("wan", seed=8), "cfg": 3.0}
    for first, second in ((model, plain), (plain, model), (model, model), (model, model.clone())):
        (guider,) = pack.call("DualModelGuider", model=first, model_negative=second, **prompts)
        with pytest.raises(pack.module("comfy_nodes.errors").NodeError, match="experts are switched in one MODEL only"):
            sample(pack, models, model, "wan", sigmas_of(TWO), guider=guider)
    (guider,) = pack.call("DualModelGuider", model=plain, model_negative=models.wan(8), **prompts)
    sample(pack, models, plain, "wan", sigmas_of(TWO), guider=guider)


CACHES = {"EasyCache": {"reuse_threshold": 3.0}, "LazyCache": {"reuse_threshold": 3.0}}


@pytest.mark.parametrize("node", CACHES)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_caches_begin_anew_with_each_expert(pack, models, composite, build, node: str, kind: str) -> None:
    """On the MODEL and on each expert's: as two samplers, each with a cache of its own."""

    def cached(model: Any) -> Any:
        return pack.call(node, model=model, start_percent=0.0, end_percent=1.0, verbose=False, **CACHES[node])[0]

    model, experts = build("wan", LONG, kind)
    sigmas = sigmas_of(LONG)
    sampling = model.get_model_object("model_sampling")
    for each in experts:
        each.add_object_patch("model_sampling", sampling)
    high = sample(pack, models, cached(experts[0]), "wan", sigmas[:7])
    (none,), (euler,) = pack.call("DisableNoise"), pack.call("KSamplerSelect", sampler_name="euler")
    (guider,) = pack.call(
        "CFGGuider",
        model=cached(experts[1]),
        positive=models.conditioning("wan"),
        negative=models.conditioning("wan", seed=8),
        cfg=1.0,
    )
    custom = {"noise": none, "sampler": euler, "sigmas": sigmas[6:], "latent_image": {"samples": high}}
    expected = pack.call("SamplerCustomAdvanced", guider=guider, **custom)[0]["samples"]
    plain = sample(pack, models, model, "wan", sigmas)
    after, before = cached(model), composed_after(composite, model, [cached(each) for each in experts])
    for each in (after, before, after):
        found = sample(pack, models, each, "wan", sigmas)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert (found - plain).abs().max() > 1e-3  # steps were skipped
    later = composed_after(composite, model, [experts[0], cached(experts[1])])
    assert (sample(pack, models, later, "wan", sigmas) - plain).abs().max() > 1e-4


def test_sigmas_a_little_above_1_run_the_first_expert(pack, models, build) -> None:
    model, experts = build("wan", TWO)
    (sigmas,) = pack.call("SetFirstSigma", sigmas=sigmas_of(TWO), sigma=1.05)
    found = sample(pack, models, model, "wan", sigmas[:2])
    assert torch.equal(found, sample(pack, models, experts[0], "wan", sigmas[:2]))
    import comfy.samplers

    churning = comfy.samplers.ksampler("euler", {"s_churn": 4.0})
    positive, negative = models.conditioning("wan"), models.conditioning("wan", seed=8)
    (guider,) = pack.call("CFGGuider", model=model, positive=positive, negative=negative, cfg=1.0)
    (noise,) = pack.call("RandomNoise", noise_seed=1)
    rest = {"noise": noise, "sampler": churning, "sigmas": sigmas_of(TWO), "latent_image": models.latent("wan")}
    assert torch.isfinite(pack.call("SamplerCustomAdvanced", guider=guider, **rest)[0]["samples"]).all()


def test_a_hand_over_is_a_line_in_the_log(pack, models, build, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = build("wan", TWO, cfgs=[3.5, 1.0])
    with caplog.at_level("INFO"):
        sample(pack, models, model, "wan", sigmas_of(TWO))
    lines = [record.getMessage() for record in caplog.records if "step 3 of 4" in record.getMessage()]
    assert lines == ["Phased experts: step 3 of 4: low_noise, sigma 0.8333, cfg 1"]
