"""A base with other weights than the one that experts were distilled from is noticed, and only such a one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pdmd_core.experts import BaseModel, Expert, Manifest, lora_to_file, write_experts
from pdmd_core.experts.format.fingerprint import fingerprint_of, sampler_of, take_fingerprint
from pdmd_core.families import family
from pdmd_core.roles import Roles, RoleSpec
from tests.comfyui.test_quantised import fp8_file, packed
from tests.comfyui.test_z_image import NAMES, adapters, diffusers_names, lora_manifest
from tests.helpers.comfyui.phased_models import LOAD, TWO, sample, sigmas_of, with_lora
from tests.helpers.comfyui.tiny_models import lora, qwen_state, z_image_state
from tests.helpers.tiny import randomise, transformer

PHASES = [phase.name for phase in TWO.phases]


@pytest.fixture(scope="module")
def wan_experts(base: Path) -> str:
    """LoRA experts of two tiny networks, that of seed 0 and that of seed 1."""
    wan, components = family("wan"), ("transformer", "transformer_2")
    entries, weights = [], {}
    for k, (name, component) in enumerate(zip(PHASES, components, strict=True)):
        roles = Roles(transformer(k), wan, {name: RoleSpec("lora", 2, 3.0)})
        randomise(roles, name, k)
        weights[name] = lora_to_file(roles.state_dict(name), 3.0, wan)
        entries.append(Expert(name, f"{name}.safetensors", "lora", "", component, 2, 3.0, wan.lora_targets))
    prints = {component: fingerprint_of(transformer(k)) for k, component in enumerate(components)}
    origin = BaseModel("tiny/wan22", wan.architecture, wan.name, None, prints)
    write_experts(base / "models/phased_experts/base_weights", Manifest(origin, TWO, tuple(entries)), weights)
    return "base_weights"


@pytest.fixture
def warned(pack, caplog: pytest.LogCaptureFixture):
    """What is said, in the log and in the report, when experts go on these bases."""

    def warned(experts: str, first: Any, second: Any = None) -> list[str]:
        caplog.clear()
        model, _ = pack.call("PhasedDMDLoadExperts", experts=experts, base_1=first, base_2=second, **LOAD)
        said = [record.getMessage() for record in caplog.records if "other weights" in record.getMessage()]
        assert all(len(text.splitlines()) == 1 for text in said)
        report = pack.call("PhasedDMDPlanReport", model=model)[1].splitlines()
        assert [f"Warning: {text.removeprefix('Phased experts: ')}" for text in said] == [
            line for line in report if line.startswith("Warning")
        ]
        return said

    return warned


def loaded(model: Any, change: Any = lambda state: state, **options: Any) -> Any:
    """The MODEL of a changed state dict, of the same sizes."""
    import comfy.sd

    state = {name: value.clone() for name, value in model.model.diffusion_model.state_dict().items()}
    config = model.model.model_config.unet_config
    sizes = {key: value for key, value in config.items() if isinstance(value, str | int | float | bool | list | tuple)}
    metadata = {"config": json.dumps({"transformer": sizes})}
    return comfy.sd.load_diffusion_model_state_dict(change(state), model_options=options, metadata=metadata)


BASES = {
    "as it is": lambda model: model,
    **{
        str(dtype): lambda model, dtype=dtype: loaded(model, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
    },
    "bfloat16 file": lambda model: loaded(model, lambda state: {k: v.bfloat16() for k, v in state.items()}),
    "fp8 file with scales": lambda model: loaded(model, fp8_file),
    "packed": packed,
}


@pytest.mark.parametrize("stored", BASES)
def test_its_own_base_is_silent_however_it_is_stored(models, warned, wan_experts, stored: str) -> None:
    assert warned(wan_experts, BASES[stored](models.wan(0)), BASES[stored](models.wan(1))) == []


@pytest.mark.parametrize("stored", BASES)
def test_another_base_is_said_however_it_is_stored(models, warned, wan_experts, stored: str) -> None:
    (text,) = warned(wan_experts, models.wan(0), BASES[stored](models.wan(5)))
    assert "the MODEL of base_2 has other weights than the transformer_2 of tiny/wan22" in text
    assert "samples differ" in text and text.endswith("compare with the base itself")


def test_a_fine_tune_of_a_few_percent_is_said(models, warned, wan_experts) -> None:
    def matrices(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: (value * 1.03 if value.ndim == 2 else value).bfloat16() for name, value in state.items()}

    (text,) = warned(wan_experts, loaded(models.wan(0), matrices), models.wan(1))
    assert "10 of 26 samples differ" in text


def test_exchanged_networks_are_said(models, warned, wan_experts) -> None:
    first, second = warned(wan_experts, models.wan(1), models.wan(0))
    assert "base_1" in first and first.endswith("it is the transformer_2 of that base: exchange the two networks")
    assert "base_2" in second and second.endswith("it is the transformer of that base: exchange the two networks")


def test_loras_of_ones_own_on_the_base_are_no_other_base(pack, models, warned, wan_experts) -> None:
    """Before they are loaded, while they are in the weights, and after."""
    import comfy.model_management

    network, other = models.wan(0), models.wan(1)
    style = with_lora(pack, network, lora("wan", 3), 2.0)
    assert warned(wan_experts, style, other) == []
    composite = pack.module("comfy_nodes.composite")
    plan = pack.module("pdmd_core.phases").PhasePlan.from_json(TWO.to_json())
    sample(pack, models, composite.compose(plan, [composite.Expert(style)] * 2), "wan", sigmas_of(TWO))
    assert style.backup or network.backup  # the LoRA is in the weights now
    assert warned(wan_experts, style, other) == [] and warned(wan_experts, network, other) == []
    comfy.model_management.unload_all_models()
    assert warned(wan_experts, style, other) == []


def test_networks_whose_names_and_weights_comfyui_joins(pack, models, base: Path, warned) -> None:
    import comfy.sd

    state, names = z_image_state(0), family("z_image")
    apart = diffusers_names(state)
    prints = take_fingerprint(apart, sampler_of(apart))
    joined = [name for name in prints if ".attention.to_" in name or ".attention.norm_" in name]
    assert len(joined) >= 5
    manifest = lora_manifest()
    manifest = replace(manifest, base=replace(manifest.base, fingerprints={"transformer": prints}))
    weights = {name: lora_to_file(adapters(k + 1), 3.0, names) for k, name in enumerate(NAMES)}
    write_experts(base / "models/phased_experts/z_weights", manifest, weights)
    assert warned("z_weights", comfy.sd.load_diffusion_model_state_dict(dict(state))) == []
    for name in joined:  # each is found at its own place
        moved = {key: value.clone() for key, value in apart.items()}
        moved[name] *= 1.104
        again = dict(state)
        for key in state:
            if key.endswith(".qkv.weight"):
                again[key] = torch.cat([moved[key.replace(".qkv.", f".to_{part}.")] for part in "qkv"])
            elif ".attention." in key:
                theirs = key.replace(".out.", ".to_out.0.").replace("q_norm", "norm_q").replace("k_norm", "norm_k")
                again[key] = moved[theirs]
        (text,) = warned("z_weights", comfy.sd.load_diffusion_model_state_dict(again))
        assert f"1 of {len(prints)} samples differ, '{name}' by 10." in text


def test_qwen_image_has_the_names_of_diffusers(pack, models, base: Path, warned) -> None:
    state, qwen = qwen_state(0), family("qwen_image")
    origin = BaseModel("tiny/qwen", qwen.architecture, qwen.name, None)
    origin = replace(origin, fingerprints={"transformer": take_fingerprint(state, sampler_of(state))})
    entries = [Expert(n, f"{n}.safetensors", "lora", "", "transformer", 2, 3.0, ("to_q", "to_v")) for n in PHASES]
    weights = {name: lora("qwen", k) for k, name in enumerate(PHASES)}
    write_experts(base / "models/phased_experts/qwen_weights", Manifest(origin, TWO, tuple(entries)), weights)
    assert warned("qwen_weights", models.qwen(0)) == []
    (text,) = warned("qwen_weights", models.qwen(1))
    assert "the MODEL of base_1 has other weights than the transformer of tiny/qwen" in text
