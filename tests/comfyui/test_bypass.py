"""LoRA experts beside the weights of their base: the same samples, and a switch leaves the weights alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.comfyui.phased_models import LOAD, TWO, plan_of, sample, sigmas_of
from tests.helpers.comfyui.tiny_models import lora, save_lora
from tests.helpers.tiny import lora_roles, save_wan_pipeline, write_lora_experts


@pytest.fixture(scope="module")
def files(base) -> list[str]:
    for k in range(3):
        save_lora(base / f"models/loras/beside_{k}.safetensors", lora("wan", k + 1))
    return [f"beside_{k}.safetensors" for k in range(3)]


def composed(pack: Any, model: Any, files: list[str], weights: str) -> Any:
    inputs = {f"lora_{k}": file for k, file in enumerate([*files[:2], "none", "none"], start=1)}
    inputs |= {f"strength_{k}": 0.8 for k in range(1, 5)}
    node = {"plan": plan_of(pack), "cfg": "", "set_shift": True, "lora_weights": weights}
    return pack.call("PhasedDMDExpertsLoRA", model=model, **node, **inputs)[0]


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a switch does to weights."""
    import comfy.model_patcher

    patcher, seen = comfy.model_patcher.ModelPatcher, list[str]()

    def noted(name: str) -> None:
        original = getattr(patcher, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if name != "unpatch_model" or kwargs.get("unpatch_weights", True):
                seen.append(f"{name} {args[0] if name == 'patch_weight_to_device' else ''}".strip())
            return original(self, *args, **kwargs)

        monkeypatch.setattr(patcher, name, call)

    for name in ("patch_weight_to_device", "unpatch_model", "load"):
        noted(name)
    return seen


def test_samples_are_those_of_merged_weights_and_a_switch_leaves_the_weights_alone(
    pack, models, files, moved: list[str]
) -> None:
    import comfy.model_management
    import comfy.sd

    base = models.wan()
    alone = sample(pack, models, base, "wan", sigmas_of(TWO))
    merged, beside = (composed(pack, base, files, weights) for weights in ("merged", "beside"))
    expected = sample(pack, models, merged, "wan", sigmas_of(TWO))
    assert "patch_weight_to_device diffusion_model.blocks.0.self_attn.q.weight" in moved
    comfy.model_management.unload_all_models()
    moved.clear()
    for again in range(2):
        found = sample(pack, models, beside, "wan", sigmas_of(TWO))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert moved.count("load") == (1 if not again else 0)  # the base, once
        assert moved.count("unpatch_model") == 0
        moved.clear()
    assert (expected - alone).abs().max() > 0.05
    assert torch.equal(sample(pack, models, base, "wan", sigmas_of(TWO)), alone)
    # one of the user's own afterwards is on both
    own = [comfy.sd.load_lora_for_models(model, None, lora("wan", 9), 1.0, 0.0)[0] for model in (merged, beside)]
    expected = sample(pack, models, own[0], "wan", sigmas_of(TWO))
    comfy.model_management.unload_all_models()
    moved.clear()
    found = sample(pack, models, own[1], "wan", sigmas_of(TWO))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert moved.count("load") == 1 and moved.count("unpatch_model") == 0
    assert torch.equal(sample(pack, models, base, "wan", sigmas_of(TWO)), alone)


def test_an_interrupted_run_takes_them_away(pack, models, files) -> None:
    import comfy.model_management

    base = models.wan()
    alone = sample(pack, models, base, "wan", sigmas_of(TWO))
    model = composed(pack, base, files, "beside")
    expected = sample(pack, models, model, "wan", sigmas_of(TWO))
    steps: list[int] = []

    def interrupt(executor: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            raise comfy.model_management.InterruptProcessingException
        return executor(*args, **kwargs)

    broken = model.clone()
    broken.add_wrapper("diffusion_model", interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(pack, models, broken, "wan", sigmas_of(TWO))
    assert torch.equal(sample(pack, models, base, "wan", sigmas_of(TWO)), alone)
    assert torch.equal(sample(pack, models, model, "wan", sigmas_of(TWO)), expected)


def test_experts_of_a_folder_and_what_is_no_product(pack, models, base, tmp_path) -> None:
    write_lora_experts(
        base / "models/phased_experts/beside", TWO, lora_roles(TWO), str(save_wan_pipeline(tmp_path / "x"))
    )
    network = models.wan()
    outputs = [
        sample(
            pack,
            models,
            pack.call("PhasedDMDLoadExperts", experts="beside", base_1=network, lora_weights=weights, **LOAD)[0],
            "wan",
            sigmas_of(TWO),
        )
        for weights in ("merged", "beside")
    ]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    # a difference of a bias is merged, whatever else is beside the weights
    tensors = lora("wan", 1)
    tensors["diffusion_model.blocks.0.self_attn.q.diff_b"] = torch.ones(24)
    files = [save_lora(base / f"models/loras/bias_{k}.safetensors", tensors).name for k in range(2)]
    outputs = [
        sample(pack, models, composed(pack, network, files, weights), "wan", sigmas_of(TWO))
        for weights in ("merged", "beside")
    ]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_what_changes_whole_weights_is_refused(pack, models, files) -> None:
    """A compiled module goes on with the first expert; a merge or wrapper of weights is of weights with the LoRA."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    error = pack.module("comfy_nodes.errors").NodeError
    model = composed(pack, models.wan(), files, "beside")
    compiled, wrapped = model.clone(), model.clone()
    set_torch_compile_wrapper(compiled, backend="eager", keys=["diffusion_model"])
    changed = {"take TorchCompileModel out": compiled}
    (merge,) = pack.call("ModelMergeSimple", model1=model, model2=models.wan(5), ratio=0.7)
    changed["as a whole (a merge of MODELs, say)"] = merge
    if hasattr(model, "add_weight_wrapper"):
        wrapped.add_weight_wrapper("diffusion_model.blocks.0.self_attn.q.weight", lambda weight: weight * 1.5)
        changed["changes diffusion_model.blocks.0.self_attn.q.weight"] = wrapped
    for words, each in changed.items():
        with pytest.raises(error) as caught:
            sample(pack, models, each, "wan", sigmas_of(TWO))
        assert str(caught.value).startswith("set lora_weights to merged") and words in str(caught.value)
    sample(pack, models, model, "wan", sigmas_of(TWO))


def test_strengths_by_step_and_hooks_of_prompts_are_those_of_merged_weights(pack, models, files) -> None:
    network, outputs = models.wan(), []
    for weights in ("merged", "beside"):
        inputs = {f"lora_{k}": file for k, file in enumerate([*files[:2], "none", "none"], start=1)}
        inputs |= {f"strength_{k}": 0.8 for k in range(1, 5)} | {"strengths": "1, 0 | -0.5, 1"}
        node = {"plan": plan_of(pack), "cfg": "", "set_shift": True, "lora_weights": weights}
        (model,) = pack.call("PhasedDMDExpertsLoRA", model=network, **node, **inputs)
        (hooks,) = pack.call("CreateHookLoraModelOnly", lora_name=files[2], strength_model=0.7)
        prompt = {"cond_NEW": models.conditioning("wan"), "strength": 1.0, "set_cond_area": "default"}
        (positive,) = pack.call("ConditioningSetProperties", hooks=hooks, **prompt)
        negative = models.conditioning("wan", seed=8)
        (guider,) = pack.call("CFGGuider", model=model, positive=positive, negative=negative, cfg=1.0)
        outputs.append([sample(pack, models, model, "wan", sigmas_of(TWO), guider=each) for each in (None, guider)])
    for merged, beside in zip(*outputs, strict=True):
        torch.testing.assert_close(merged, beside, atol=1e-5, rtol=1e-5)
    assert (outputs[0][0] - outputs[0][1]).abs().max() > 0.05


def test_the_network_of_the_base_is_as_it_was_after_a_run(pack, models, files, monkeypatch) -> None:
    """Also where something holds the MODELs that were loaded, as the traceback of an error does."""
    import comfy.sampler_helpers

    prepare, held = comfy.sampler_helpers.prepare_sampling, []

    def holding(model: Any, *args: Any, **kwargs: Any) -> Any:
        held.append(model)
        return prepare(model, *args, **kwargs)

    monkeypatch.setattr(comfy.sampler_helpers, "prepare_sampling", holding)
    base = models.wan()
    first, second = (composed(pack, base, order, "beside") for order in (files, files[::-1]))
    expected = []
    for model in (first, second, first, second):
        expected.append(sample(pack, models, model, "wan", sigmas_of(TWO)))
        assert not any(layer._forward_hooks for layer in base.model.modules())
    assert len(held) == 8 and (expected[0] - expected[1]).abs().max() > 0.05
    assert torch.equal(expected[2], expected[0]) and torch.equal(expected[3], expected[1])
