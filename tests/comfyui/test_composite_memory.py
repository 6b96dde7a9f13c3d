"""What a composite MODEL loads and patches, and that a run leaves everything as it was, however it ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.comfyui.phased_models import PLANS, TWO, noise_of, sample, sigmas_of, state
from tests.helpers.comfyui.tiny_models import lora


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The MODELs of every call that loads some."""
    import comfy.model_management as management

    seen: list[list[Any]] = []
    original = management.load_models_gpu

    def load(models: list[Any], *args: Any, **kwargs: Any) -> Any:
        seen.append([model.model for model in models])
        return original(models, *args, **kwargs)

    monkeypatch.setattr(management, "load_models_gpu", load)
    return seen


def test_only_the_needed_experts_are_loaded_each_once(pack, models, build, loads) -> None:
    plan = PLANS["three experts"]
    model, experts = build("wan", plan)
    high, middle, low = (expert.model for expert in experts)
    sample(pack, models, model, "wan", sigmas_of(plan))
    assert loads == [[high], [middle], [low]]
    loads.clear()
    sample(pack, models, model, "wan", sigmas_of(plan)[2:])
    assert loads == [[low]]
    loads.clear()
    sample(pack, models, model, "wan", sigmas_of(plan)[:3])
    assert loads == [[high], [middle]]


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.model.state_dict().items()}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_callers_models_are_not_changed(pack, models, composite, kind: str) -> None:
    import comfy.model_management
    import comfy.sd

    phases = pack.module("pdmd_core.phases")
    plan = phases.PhasePlan.from_steps([2, 2], shift=5.0)
    base = models.wan()
    experts = [base, models.wan(1)]
    if kind == "lora":
        experts = [comfy.sd.load_lora_for_models(base, None, lora("wan", k + 1), 1.0, 0.0)[0] for k in range(2)]
        assert all(expert.model is base.model for expert in experts)  # the base is in memory once
    before, alone = [state(expert) for expert in experts], sample(pack, models, base, "wan", sigmas_of(TWO))
    comfy.model_management.unload_all_models()
    originals = [weights(expert) for expert in experts]
    model = composite.compose(plan, [composite.Expert(expert) for expert in experts])
    sample(pack, models, model, "wan", sigmas_of(TWO))
    assert [state(expert) for expert in experts] == before
    assert torch.equal(sample(pack, models, base, "wan", sigmas_of(TWO)), alone)
    comfy.model_management.unload_all_models()
    for expert, original in zip(experts, originals, strict=True):
        assert all(torch.equal(value, original[name]) for name, value in weights(expert).items())


def test_weights_are_patched_once_for_all_runs_and_anew_when_a_lora_changes(
    pack, models, build, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_patcher
    import comfy.sd

    model, patched = build("wan", TWO)[0], []
    original = comfy.model_patcher.ModelPatcher.patch_weight_to_device

    def patch(self: Any, key: str, *args: Any, **kwargs: Any) -> Any:
        if key in self.patches:
            patched.append(key)
        return original(self, key, *args, **kwargs)

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "patch_weight_to_device", patch)
    weak, strong = (comfy.sd.load_lora_for_models(model, None, lora("wan", 9), x, 0.0)[0] for x in (0.2, 1.0))
    first = sample(pack, models, weak, "wan", sigmas_of(TWO))
    assert len(patched) == 8
    assert torch.equal(sample(pack, models, weak, "wan", sigmas_of(TWO)), first) and len(patched) == 8
    second = sample(pack, models, strong, "wan", sigmas_of(TWO))
    assert len(patched) == 16
    low = [sample(pack, models, each, "wan", sigmas_of(TWO)[2:]) for each in (weak, strong)]
    assert not torch.allclose(first, second, atol=1e-3) and not torch.allclose(*low, atol=1e-3)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_an_interrupted_run_leaves_everything_as_it_was(pack, models, build, kind: str, step: int) -> None:
    import comfy.model_management
    import comfy.samplers

    model, _ = build("wan", TWO, kind)
    expected = sample(pack, models, model, "wan", sigmas_of(TWO))
    positive, negative = models.conditioning("wan"), models.conditioning("wan", seed=8)
    (guider,) = pack.call("CFGGuider", model=model, positive=positive, negative=negative, cfg=1.0)
    before, attributes = state(model), set(vars(guider))

    def interrupt(i: int, *rest: Any) -> None:
        if i == step:
            raise comfy.model_management.InterruptProcessingException

    latent = models.latent("wan")["samples"]
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        guider.sample(
            noise_of({"samples": latent}),
            latent,
            comfy.samplers.sampler_object("euler"),
            sigmas_of(TWO),
            callback=interrupt,
        )
    assert guider.model_patcher is model
    assert state(model) == before
    assert set(vars(guider)) - attributes <= {"inner_model", "conds", "loaded_models"}  # which core leaves, too
    assert torch.equal(sample(pack, models, model, "wan", sigmas_of(TWO), guider=guider), expected)
    assert torch.equal(sample(pack, models, model, "wan", sigmas_of(TWO)), expected)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_out_of_memory_at_the_switch_leaves_everything_as_it_was(
    pack, models, build, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management
    import comfy.sampler_helpers

    model, _ = build("wan", TWO, kind)
    expected, prepare = sample(pack, models, model, "wan", sigmas_of(TWO)), comfy.sampler_helpers.prepare_sampling
    positive, negative = models.conditioning("wan"), models.conditioning("wan", seed=8)
    (guider,) = pack.call("CFGGuider", model=model, positive=positive, negative=negative, cfg=1.0)
    before, calls = state(model), []

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise comfy.model_management.OOM_EXCEPTION("no memory for the next expert")
        return prepare(*args, **kwargs)

    monkeypatch.setattr(comfy.sampler_helpers, "prepare_sampling", full)
    with pytest.raises(comfy.model_management.OOM_EXCEPTION):
        sample(pack, models, model, "wan", sigmas_of(TWO), guider=guider)
    assert guider.model_patcher is model
    assert state(model) == before
    comfy.model_management.unload_all_models()  # as the server does then
    for options in ({"guider": guider}, {}):
        assert torch.equal(sample(pack, models, model, "wan", sigmas_of(TWO), **options), expected)
