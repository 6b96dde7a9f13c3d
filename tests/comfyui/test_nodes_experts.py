"""The nodes that make a MODEL of files: of LoRAs and of experts folders."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pdmd_core.experts import BaseModel, Expert, Manifest, PhasedExperts, write_experts
from pdmd_core.phases import PhasePlan
from tests.helpers import tiny
from tests.helpers.comfyui.phased_models import LOAD, TWO, plan_of, sample, sigmas_of
from tests.helpers.comfyui.tiny_models import lora, qwen_state, save_lora

NO_LORAS = {f"lora_{k}": "none" for k in range(1, 5)} | {f"strength_{k}": 1.0 for k in range(1, 5)}


@pytest.fixture(scope="module")
def lora_files(base: Path) -> list[str]:
    names = [f"tiny_{k}.safetensors" for k in (1, 2)]
    for k, name in enumerate(names):
        save_lora(base / "models/loras" / name, lora("wan", k + 1))
    save_lora(base / "models/loras/qwen.safetensors", lora("qwen", 1))
    larger = {key: torch.cat([value, value], -1) if "down" in key else value for key, value in lora("wan", 1).items()}
    save_lora(base / "models/loras/larger.safetensors", larger)
    half = {f"diffusion_model.blocks.1.cross_attn.v.hada_{part}": torch.ones(2, 2) for part in ("w1_a", "w1_b", "w2_a")}
    save_lora(base / "models/loras/half.safetensors", half)
    pictures = {f"transformer_blocks.0.img_mlp.net.2.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    save_lora(base / "models/loras/pictures.safetensors", pictures)
    text = {f"lora_te_x.lora_{half}.weight": torch.ones(2, 2) for half in ("up", "down")}
    save_lora(base / "models/loras/text.safetensors", text)
    return names


def test_experts_from_loras_equal_core_lora_loaders_before_the_models_node(pack, models, lora_files) -> None:
    base, plan = models.wan(), plan_of(pack)
    chosen = {**NO_LORAS, "lora_1": lora_files[0], "lora_2": lora_files[1], "strength_1": 0.8}
    (model,) = pack.call("PhasedDMDExpertsLoRA", model=base, plan=plan, cfg="", set_shift=True, **chosen)
    by_hand = [
        pack.call("LoraLoaderModelOnly", model=base, lora_name=name, strength_model=strength)[0]
        for name, strength in zip(lora_files, (0.8, 1.0), strict=True)
    ]
    (expected,) = pack.call(
        "PhasedDMDExperts", plan=plan, cfg="", set_shift=True, model_1=by_hand[0], model_2=by_hand[1]
    )
    outputs = [sample(pack, models, each, "wan", sigmas_of(TWO)) for each in (model, expected)]
    assert torch.equal(*outputs)


def test_strengths_by_step_are_those_of_a_phase_for_each_step(pack, models, lora_files) -> None:
    base, common = models.wan(), {"cfg": "", "set_shift": True}
    chosen = {**NO_LORAS, "lora_1": lora_files[0], "lora_2": lora_files[1], "strength_2": 0.5}
    by_hand = {**NO_LORAS, "strength_2": 0.6}
    for k, file in enumerate((lora_files[0], lora_files[0], lora_files[1]), start=1):
        by_hand[f"lora_{k}"] = file
    by_hand["strength_3"] = 0.4
    steps = plan_of(pack, "1, 1, 2")
    (expected,) = pack.call("PhasedDMDExpertsLoRA", model=base, plan=steps, **common, **by_hand)
    wanted = sample(pack, models, expected, "wan", sigmas_of(TWO))
    for strengths in ("1, 0.6 | 0.8", [1, 0.6, 0.8, 0.8]):
        (model,) = pack.call(
            "PhasedDMDExpertsLoRA", model=base, plan=plan_of(pack), strengths=strengths, **common, **chosen
        )
        assert torch.equal(sample(pack, models, model, "wan", sigmas_of(TWO)), wanted)
    _, text = pack.call("PhasedDMDPlanReport", model=model)
    assert "step 2  high_noise_2  sigma 0.9375" in text and "step 4  low_noise  sigma 0.6250" in text


def test_an_undistilled_first_step_with_cfg(pack, models, lora_files) -> None:
    """The plan's first step becomes a phase of its own, without LoRA and with guidance; the sigmas stay."""
    base, plan = models.wan(), plan_of(pack, "1, 1, 2")
    assert plan.sigmas == TWO.sigmas
    chosen = {**NO_LORAS, "lora_2": lora_files[0], "lora_3": lora_files[1]}
    (model,) = pack.call("PhasedDMDExpertsLoRA", model=base, plan=plan, cfg="3.5, 1, 1", set_shift=True, **chosen)
    found = sample(pack, models, model, "wan", sigmas_of(TWO))
    distilled = {**NO_LORAS, "lora_1": lora_files[0], "lora_2": lora_files[1]}
    (rest,) = pack.call("PhasedDMDExpertsLoRA", model=base, plan=plan_of(pack), cfg="1", set_shift=True, **distilled)
    first = sample(pack, models, base, "wan", sigmas_of(TWO)[:2], cfg=3.5)
    # by hand, with the hand-over of two samplers: noise once, then the other MODEL on what is left
    positive, negative = models.conditioning("wan"), models.conditioning("wan", seed=8)
    (guider,) = pack.call("CFGGuider", model=rest, positive=positive, negative=negative, cfg=1.0)
    (none,) = pack.call("DisableNoise")
    (euler,) = pack.call("KSamplerSelect", sampler_name="euler")
    expected = pack.call(
        "SamplerCustomAdvanced",
        noise=none,
        guider=guider,
        sampler=euler,
        sigmas=sigmas_of(TWO)[1:],
        latent_image={"samples": first},
    )[0]["samples"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - sample(pack, models, rest, "wan", sigmas_of(TWO))).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "qwen.safetensors",  # whose modules other models have, too
            "no key of this LoRA belongs to a WAN21, they look like 'diffusion_model.tr",
        ),
        ("larger.safetensors", "is 24x24 in this MODEL and 24x48 in the LoRA"),
        ("text.safetensors", "belongs to a WAN21, they look like 'lora_te_x.lora_down.weight' (a text encoder's"),
        ("pictures.safetensors", "belongs to a WAN21: the LoRA is for Qwen-Image, this MODEL is a Wan"),
        ("half.safetensors", "'diffusion_model.blocks.1.cross_attn.v.hada_w2_b' is missing beside its other half"),
    ],
)
def test_loras_that_do_not_fit_are_refused_in_words(pack, models, lora_files, fails, file: str, message: str) -> None:
    chosen = {**NO_LORAS, "lora_1": lora_files[0], "lora_2": file}
    common = {"model": models.wan(), "plan": plan_of(pack), "cfg": "", "set_shift": True}
    fails(message, "PhasedDMDExpertsLoRA", **common, **chosen)
    fails(file, "PhasedDMDExpertsLoRA", **common, **chosen)


@pytest.mark.parametrize(
    ("file", "alpha", "metadata", "message"),
    [
        ("pickled.pt", 3.0, None, "only safetensors files are read, others can bring code"),
        ("pickled.safetensors", 3.0, None, "not a readable safetensors file"),
        ("nan.safetensors", float("nan"), None, ".alpha is not one positive number"),
        ("infinite.safetensors", float("inf"), None, ".alpha is not one positive number"),
        ("negative.safetensors", -3.0, None, ".alpha is not one positive number"),
        ("none.safetensors", None, {"transformer.lora_alpha": -3}, "lora_alpha in the metadata is a positive number"),
    ],
)
def test_loras_with_code_or_an_alpha_that_scales_to_nonsense_are_refused(
    pack, models, lora_files, fails, base: Path, file: str, alpha: float | None, metadata: Any, message: str
) -> None:
    path, tensors = base / "models/loras" / file, lora("wan", 1)
    tensors |= {key: torch.tensor(alpha) for key in tensors if key.endswith(".alpha") and alpha is not None}
    if alpha is None:
        tensors = {key: value for key, value in tensors.items() if not key.endswith(".alpha")}
    if "pickled" in file:
        torch.save(tensors, path)
    else:
        words = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path, metadata=words)
    chosen = {**NO_LORAS, "lora_1": lora_files[0], "lora_2": file}
    common = {"model": models.wan(), "plan": plan_of(pack), "cfg": "", "set_shift": True}
    fails(message, "PhasedDMDExpertsLoRA", **common, **chosen)
    fails(file, "PhasedDMDExpertsLoRA", **common, **chosen)


def test_each_module_of_a_lora_is_scaled_by_its_own_alpha(pack, models, base: Path) -> None:
    tensors = lora("wan", 1)
    alphas = sorted(key for key in tensors if key.endswith(".alpha"))
    without = {key: value for key, value in tensors.items() if key != alphas[1]}
    save_lora(base / "models/loras/mixed.safetensors", without | {alphas[0]: torch.tensor(0.5)})
    chosen = {**NO_LORAS, "lora_1": "mixed.safetensors", "strength_1": 0.7}
    common = {"plan": plan_of(pack, "4"), "cfg": "", "set_shift": True}
    (model,) = pack.call("PhasedDMDExpertsLoRA", model=models.wan(), **common, **chosen)
    (core,) = pack.call("LoraLoaderModelOnly", model=models.wan(), lora_name="mixed.safetensors", strength_model=0.7)
    (expected,) = pack.call("PhasedDMDExperts", model_1=core, **common)
    outputs = [sample(pack, models, each, "wan", sigmas_of(TWO)) for each in (model, expected)]
    assert torch.equal(*outputs)


def test_lora_slots_that_do_not_fit_the_plan(pack, models, lora_files, fails) -> None:
    common = {"model": models.wan(), "plan": plan_of(pack), "cfg": "", "set_shift": True}
    fails("no LoRA is chosen for any phase", "PhasedDMDExpertsLoRA", **common, **NO_LORAS)
    extra = {**NO_LORAS, "lora_1": lora_files[0], "lora_3": lora_files[1]}
    fails("lora_3 would never run", "PhasedDMDExpertsLoRA", **common, **extra)


def test_experts_of_the_other_phase_are_named_before_a_run_and_in_the_report(
    pack, models, experts_folders, base: Path
) -> None:
    for phase in TWO.phases:
        shutil.copy(
            experts_folders["lora"] / f"{phase.name}.safetensors", base / f"models/loras/own_{phase.name}.safetensors"
        )
    exchanged = {**NO_LORAS, "lora_1": "own_low_noise.safetensors", "lora_2": "own_high_noise.safetensors"}
    node, plan = pack.module("comfy_nodes.expert_nodes").ExpertsFromLoRAs, plan_of(pack)
    said = "exchange lora_1 and lora_2: each was distilled for the phase of the other"
    assert node.misplaced(plan, exchanged) == [said]
    assert node.misplaced(plan, {**NO_LORAS, "lora_1": "own_high_noise.safetensors", "lora_2": "gone"}) == []
    common = {"model": models.wan(), "plan": plan, "cfg": "", "set_shift": True}
    (model,) = pack.call("PhasedDMDExpertsLoRA", **common, **exchanged)
    assert pack.call("PhasedDMDPlanReport", model=model, sigmas=sigmas_of(TWO))[1].startswith(f"Warning: {said}")


@pytest.fixture(scope="module")
def experts_folders(base: Path) -> dict[str, Path]:
    """LoRA and full experts of the tiny Wan, LoRA experts of two base networks, full experts of a tiny Qwen-Image."""
    root, folders = base / "models/phased_experts", {}
    folders["lora"] = root / "tiny/lora"
    tiny.write_lora_experts(folders["lora"], TWO, tiny.lora_roles(TWO))
    names = [phase.name for phase in TWO.phases]
    folders["full"] = root / "tiny_full"
    entries = tuple(Expert(name, f"{name}.safetensors", "full", "") for name in names)
    states = {name: dict(tiny.transformer(seed).state_dict()) for seed, name in enumerate(names)}
    origin = BaseModel("tiny/wan", "WanTransformer3DModel", "wan")
    write_experts(folders["full"], Manifest(origin, TWO, entries), states)
    folders["qwen"] = root / "tiny_qwen"
    origin = BaseModel("tiny/qwen", "QwenImageTransformer2DModel", "qwen_image")
    write_experts(
        folders["qwen"], Manifest(origin, TWO, entries), {name: qwen_state(k) for k, name in enumerate(names)}
    )
    folders["two_networks"] = root / "tiny_two_networks"
    entries = tuple(
        Expert(name, f"{name}.safetensors", "lora", "", component, 2, 3.0, ("attn1.to_q",))
        for name, component in zip(names, ("transformer", "transformer_2"), strict=True)
    )
    origin = BaseModel("tiny/wan22", "WanTransformer3DModel", "wan")
    weights = {name: lora("wan", k + 1) for k, name in enumerate(names)}
    write_experts(folders["two_networks"], Manifest(origin, TWO, entries, 1.0), weights)
    return folders


def test_load_phased_experts_gives_what_core_nodes_give_by_hand(pack, models, experts_folders) -> None:
    import comfy.sd
    import comfy.utils

    base, second = models.wan(0), models.wan(5)
    model, plan = pack.call("PhasedDMDLoadExperts", experts="tiny/lora", base_1=base, **LOAD)
    assert plan.to_dict() == TWO.to_dict()
    assert pack.call("PhasedDMDPlanFromExperts", experts="tiny/lora")[0] == plan

    def by_hand(folder: str, *bases: Any) -> Any:
        files = [experts_folders[folder] / f"{phase.name}.safetensors" for phase in TWO.phases]
        loaded = [comfy.utils.load_torch_file(str(file)) for file in files]
        adapted = [
            comfy.sd.load_lora_for_models(each, None, file, 1.0, 0.0)[0]
            for each, file in zip(bases, loaded, strict=True)
        ]
        common = {"plan": plan, "cfg": "1", "set_shift": True}
        return pack.call("PhasedDMDExperts", model_1=adapted[0], model_2=adapted[1], **common)[0]

    sigmas = sigmas_of(TWO)
    outputs = [sample(pack, models, each, "wan", sigmas, cfg=6.0) for each in (model, by_hand("lora", base, base))]
    assert torch.equal(*outputs)  # cfg 6 of the sampler gives way to the guidance of training, 1
    (weak, _) = pack.call("PhasedDMDLoadExperts", experts="tiny/lora", base_1=base, **{**LOAD, "strength": 0.0})
    assert torch.equal(sample(pack, models, weak, "wan", sigmas), sample(pack, models, base, "wan", sigmas))
    by_step = {**LOAD, "expert_strengths": "1, 0.5 | 1"}
    (_, divided) = pack.call("PhasedDMDLoadExperts", experts="tiny/lora", base_1=base, **by_step)
    assert [phase.name for phase in divided.phases] == ["high_noise_1", "high_noise_2", "low_noise"]
    (both, _) = pack.call("PhasedDMDLoadExperts", experts="tiny_two_networks", base_1=base, base_2=second, **LOAD)
    outputs = [sample(pack, models, each, "wan", sigmas) for each in (both, by_hand("two_networks", base, second))]
    assert torch.equal(*outputs)


def test_strengths_of_the_manifest_are_used_and_shown(pack, models, experts_folders) -> None:
    import nodes

    folder, own = experts_folders["lora"].parent / "weak", {"high_noise": 0.5, "low_noise": -0.25}
    PhasedExperts.open(experts_folders["lora"]).at_strength(own).save_pretrained(folder)
    kind, given = nodes.NODE_CLASS_MAPPINGS["PhasedDMDLoadExperts"], {**LOAD, "base_1": models.wan(0), "strength": 0.8}
    found = kind.PREPARE_CLASS_CLONE(None).execute(experts="tiny/weak", **given)
    by_hand = pack.call("PhasedDMDLoadExperts", experts="tiny/lora", expert_strengths="0.5, -0.25", **given)[0]
    outputs = [sample(pack, models, each, "wan", sigmas_of(TWO)) for each in (found.args[0], by_hand)]
    assert torch.equal(*outputs)
    shown = [phase["strength"] for phase in found.ui["phase_plan"][0]["phases"]]
    assert shown == pytest.approx([0.4, -0.2]), "what is applied"


def test_set_shift_is_the_users_choice_on_every_node(pack, models, experts_folders, lora_files) -> None:
    wan, common = models.wan(), {"plan": plan_of(pack, shift=5.5), "cfg": ""}
    own = wan.get_model_object("model_sampling").shift
    chosen = {**NO_LORAS, "lora_1": lora_files[0]}
    for set_shift, shift in ((True, 5.5), (False, own)):
        made = [
            pack.call("PhasedDMDExperts", model_1=wan, model_2=wan, set_shift=set_shift, **common)[0],
            pack.call("PhasedDMDExpertsLoRA", model=wan, set_shift=set_shift, **chosen, **common)[0],
        ]
        assert [model.get_model_object("model_sampling").shift for model in made] == pytest.approx([shift] * 2)
        load = {**LOAD, "set_shift": set_shift}
        (model, _) = pack.call("PhasedDMDLoadExperts", experts="tiny/lora", base_1=wan, **load)
        assert model.get_model_object("model_sampling").shift == pytest.approx(5.0 if set_shift else own)


@pytest.mark.parametrize("family", ["wan", "qwen"])
def test_full_experts_are_the_networks_themselves(pack, models, experts_folders, family: str) -> None:
    name = {"wan": "tiny_full", "qwen": "tiny_qwen"}[family]
    base = {"base_1": models.wan()} if family == "wan" else {}
    model, plan = pack.call("PhasedDMDLoadExperts", experts=name, **base, **LOAD)
    composite = pack.module("comfy_nodes.composite")
    expected = composite.compose(plan, [composite.Expert(models.load(family, seed)) for seed in (0, 1)])
    outputs = [sample(pack, models, each, family, sigmas_of(TWO)) for each in (model, expected)]
    assert torch.equal(*outputs)


def test_experts_that_cannot_be_loaded_say_why(pack, models, experts_folders, fails, base: Path) -> None:
    load = {"node": "PhasedDMDLoadExperts", **LOAD}
    fails("connect its base to base_1", experts="tiny/lora", **load)
    fails("connect its base to base_2", experts="tiny_two_networks", base_1=models.wan(), **load)
    fails("these experts belong to tiny/wan (WanTransformer3DModel)", experts="tiny/lora", base_1=models.qwen(), **load)
    fails("give a Hub id", experts="(Hub id)", **load)
    fails("no experts folder 'x'", experts="x", **load)
    fails("cfg is a number from 0 to 100", experts="tiny/lora", base_1=models.wan(), **{**load, "cfg": "high"})
    broken = base / "models/phased_experts/broken"
    tiny.write_lora_experts(broken, TWO, tiny.lora_roles(TWO))
    with (broken / "low_noise.safetensors").open("ab") as file:
        file.write(b"x")
    fails("changed or cut off, download it again", experts="broken", base_1=models.wan(), **load)
    (broken / "low_noise.safetensors").unlink()
    fails("low_noise.safetensors of expert 'low_noise' is missing", experts="broken", base_1=models.wan(), **load)
    (broken / "phased_experts.json").unlink()
    entries = tuple(Expert(phase.name, f"{phase.name}.safetensors", "full", "") for phase in TWO.phases)
    manifest = Manifest(BaseModel("tiny/wan", "WanTransformer3DModel", "wan"), TWO, entries)
    unlike = {"no network": {"weight": torch.ones(2)}, "wrong": {**tiny.transformer().state_dict()}}
    unlike["wrong"]["blocks.0.attn1.to_q.weight"] = torch.ones(3, 24)
    for state, message in zip(
        unlike.values(), ("ComfyUI does not know this network (WanT", "does not load: "), strict=True
    ):
        write_experts(broken, manifest, dict.fromkeys([phase.name for phase in TWO.phases], state))
        fails(message, experts="broken", base_1=models.wan(), **load)
        fails("(high_noise.safetensors of broken)", experts="broken", base_1=models.wan(), **load)
    lacking = {key: value for key, value in tiny.transformer().state_dict().items() if key != "proj_out.bias"}
    write_experts(broken, manifest, dict.fromkeys([phase.name for phase in TWO.phases], lacking))
    fails("1 weights are missing or unknown, for example 'head.head.bias'", experts="broken", **load)
    (broken / "phased_experts.json").unlink()


def test_of_equal_names_the_users_own_folder_is_used(pack, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths

    loading = pack.module("comfy_nodes.loading")
    roots = [base / "models/phased_experts", base / "elsewhere"]
    for root, plan in zip(roots, (TWO, PhasePlan.from_steps([1, 1], shift=3.0)), strict=True):
        tiny.write_lora_experts(root / "a/b/twice", plan, tiny.lora_roles(plan))
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda name: list(map(str, roots)))
    assert loading.experts_names() == sorted(set(loading.experts_names())) and "a/b/twice" in loading.experts_names()
    assert loading.open_experts("a/b/twice").manifest.plan.to_dict() == TWO.to_dict()


def test_a_changed_folder_is_loaded_again_and_a_new_one_is_listed(pack, our_nodes, base: Path) -> None:
    folder = base / "models/phased_experts/appears"
    kind = our_nodes["PhasedDMDLoadExperts"]

    def listed() -> list[str]:
        return next(entry for entry in kind.define_schema().inputs if entry.id == "experts").options

    assert "appears" not in listed()
    tiny.write_lora_experts(folder, TWO, tiny.lora_roles(TWO))
    assert "appears" in listed()
    kinds = (kind, our_nodes["PhasedDMDPlanFromExperts"])
    before = [each.fingerprint_inputs(experts="appears") for each in kinds]
    tiny.write_lora_experts(folder, TWO, tiny.lora_roles(TWO, rank=2))
    for each, old in zip(kinds, before, strict=True):
        assert each.fingerprint_inputs(experts="appears") != old
    assert "(Hub id)" in listed() and "(Hub id)" not in pack.module("comfy_nodes.loading").experts_names()


def test_another_text_in_a_widget_does_not_read_full_experts_again(pack, models, our_nodes, base: Path) -> None:
    """As ComfyUI does it: it asks whether the node changed, drops what it made, and runs it again."""
    folder = base / "models/phased_experts/kept"
    names = [phase.name for phase in TWO.phases]
    manifest = Manifest(
        BaseModel("tiny/wan", "WanTransformer3DModel", "wan"),
        TWO,
        tuple(Expert(name, f"{name}.safetensors", "full", "") for name in names),
    )

    def write(first_seed: int) -> None:
        states = {name: dict(tiny.transformer(first_seed + k).state_dict()) for k, name in enumerate(names)}
        write_experts(folder, manifest, states)

    def run(cfg: str) -> list[weakref.ref[Any]]:
        inputs = {**LOAD, "cfg": cfg}
        (model, _) = pack.call("PhasedDMDLoadExperts", experts="kept", base_1=models.wan(), **inputs)
        made.append(model)
        return [
            weakref.ref(each.model.model) for each in pack.module("comfy_nodes.composite").composite_of(model).experts
        ]

    def asked_and_dropped() -> None:
        our_nodes["PhasedDMDLoadExperts"].fingerprint_inputs(experts="kept")
        made.clear()
        gc.collect()

    made: list[Any] = []
    write(0)
    before = run("1")
    asked_and_dropped()
    after = run("2")
    assert len(after) == 2 and [each() for each in after] == [each() for each in before] and None not in after
    assert all(each() is not None for each in after)
    write(5)
    asked_and_dropped()
    assert {id(each()) for each in run("2")}.isdisjoint({id(each()) for each in after})
    gc.collect()
    assert all(each() is None for each in after)  # what is not used any more is not kept
    asked_and_dropped()
    pack.module("comfy_nodes.loaded").let_go({})
    gc.collect()
    assert not pack.module("comfy_nodes.loaded")._models
