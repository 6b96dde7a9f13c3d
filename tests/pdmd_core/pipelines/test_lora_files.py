"""LoRA files of other projects in diffusers: the result is that of the explicit changes of weights that they mean."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from pdmd_core.experts import ExpertsError, PhasedExperts
from pdmd_core.families import family
from pdmd_core.phases import PhasePlan
from pdmd_core.pipelines import attach_experts, detach_experts, load_phased_pipeline
from tests.helpers.families.case import Case
from tests.helpers.families.cases import CASES
from tests.helpers.lora_layouts import LAYOUTS, RANK, added, deltas_of, pairs_of, save, wan_of_2026, with_alpha
from tests.helpers.tiny_pipelines import PLAN, euler

WAN = family("wan")
LINEAR = ("to_q", "to_k", "to_v", "to_out.0")


def network(case: Case, component: str = "transformer") -> nn.Module:
    return getattr(case.build(), component)


def check(case: Case, experts: PhasedExperts, networks: Sequence[nn.Module]) -> None:
    """Attached, the pipeline samples what networks with changed weights do; detached, what it did before."""
    pipe = case.build()
    before = {name: value.clone() for name, value in pipe.transformer.named_parameters()}
    attach_experts(pipe, experts)
    torch.testing.assert_close(case.sample(pipe), euler(case, experts.manifest.plan, networks), rtol=1e-4, atol=1e-4)
    detach_experts(pipe)
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.named_parameters())
    assert not getattr(pipe.transformer, "peft_config", None)


@pytest.mark.parametrize("name", ["wan_image_to_video", "wan_two_image_to_video", "wan_two"])
def test_every_key_of_a_wan_pair_of_2026_is_applied_or_named(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file of Wan 2.1 image to video has keys for which other bases have no place: these and no others are named."""
    case, full = CASES[name], network(CASES["wan_image_to_video"])
    files, changes = {}, []
    for seed, end in enumerate(("high", "low")):
        tensors, deltas = wan_of_2026(full, WAN, seed + 1)
        if name == "wan_two":  # of another width there, which would be refused
            tensors.pop("diffusion_model.patch_embedding.diff")
            deltas.pop("patch_embedding.weight")
        files[end] = save(tmp_path / f"{end}.safetensors", tensors)
        changes.append(deltas)
    two = "two" in name
    components = None if two else ["transformer"] * 2
    experts = PhasedExperts.from_lora_files(PLAN, **files, components=components)
    networks = [network(case, "transformer_2" if two and k else "transformer") for k in range(2)]
    missing = set(changes[0]) - {key for key, _ in networks[0].named_parameters()}
    assert bool(missing) == two
    with caplog.at_level(logging.WARNING, "pdmd_core"):
        check(case, experts, [added(n, d) for n, d in zip(networks, changes, strict=True)])
    said = [record.getMessage() for record in caplog.records if "no place" in record.getMessage()]
    assert len(said) == (2 if two else 0)
    for line in said:
        assert "30 of its keys have no place in this WanTransformer3DModel" in line
        assert "cross_attn.k_img.alpha|lora_down.weight|lora_up.weight|diff_b (8)" in line and "img_emb.proj.*" in line
        assert "norm_k_img.diff (2)" in line and "text_embedding" not in line and "diff_m" not in line


@pytest.mark.parametrize(
    ("name", "layout"), [("wan", "kohya"), ("qwen_image", "native"), ("z_image", "kohya"), ("z_image", "peft")]
)
def test_a_layout_that_the_pipeline_s_own_loader_may_not_read(name: str, layout: str, tmp_path: Path) -> None:
    """All of them: ``experts/lora/test_file.py``."""
    case = CASES[name]
    assert case.family is not None
    pairs = pairs_of(network(case), 1, LINEAR)
    tensors = with_alpha(LAYOUTS[layout](case.family, pairs), 1.0)
    experts = PhasedExperts.from_lora_files(PhasePlan.from_steps([2]), save(tmp_path / "x.safetensors", tensors))
    check(case, experts, [added(network(case), deltas_of(pairs, 1.0 / RANK))])


@pytest.mark.parametrize("metadata", [{"alpha": "1"}, {"lora_adapter_metadata": {"transformer.lora_alpha": 1}}])
def test_alpha_in_the_metadata_counts(metadata: dict[str, object], tmp_path: Path) -> None:
    case = CASES["wan"]
    pairs = pairs_of(network(case), 1, LINEAR)
    path = save(tmp_path / "x.safetensors", LAYOUTS["diffusers"](WAN, pairs), **metadata)
    experts = PhasedExperts.from_lora_files(PhasePlan.from_steps([2]), path)
    assert experts.manifest.experts[0].alpha == 1.0
    check(case, experts, [added(network(case), deltas_of(pairs, 1.0 / RANK))])


def test_a_folder_of_peft_with_alpha_beside_its_weights_also_when_saved(tmp_path: Path) -> None:
    case, folder = CASES["wan"], tmp_path / "peft"
    folder.mkdir()
    pairs = pairs_of(network(case), 1, LINEAR)
    save(folder / "adapter_model.safetensors", LAYOUTS["peft"](WAN, pairs))
    (folder / "adapter_config.json").write_text('{"lora_alpha": 1, "r": 4, "peft_type": "LORA", "use_rslora": false}')
    experts = PhasedExperts.from_lora_files(PhasePlan.from_steps([2]), folder)
    changed = added(network(case), deltas_of(pairs, 1.0 / RANK))
    check(case, experts, [changed])
    pipe = attach_experts(case.build(), experts)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = load_phased_pipeline(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(case.sample(loaded), euler(case, experts.manifest.plan, [changed]), rtol=1e-4, atol=1e-4)


def test_a_pipeline_is_saved_without_the_differences_of_its_experts(tmp_path: Path) -> None:
    case = CASES["wan"]
    files = [wan_of_2026(network(case), WAN, seed) for seed in (1, 2)]
    paths = [save(tmp_path / f"{n}.safetensors", tensors) for n, (tensors, _) in enumerate(files)]
    experts = PhasedExperts.from_lora_files(PLAN, *paths, components=["transformer"] * 2)
    pipe = attach_experts(case.build(), experts)
    expected = case.sample(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(case.sample(pipe), expected, rtol=0, atol=0)
    loaded = load_phased_pipeline(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(case.sample(loaded), expected, rtol=1e-5, atol=1e-5)
    stock = type(pipe).from_pretrained(tmp_path / "saved")
    original = dict(network(case).named_parameters())
    assert all(torch.equal(value, original[name]) for name, value in stock.transformer.named_parameters())


def test_each_expert_has_a_strength_of_its_own(tmp_path: Path) -> None:
    """One file of Wan 2.1 on both networks of 2.2."""
    case = CASES["wan_two"]
    tensors, deltas = wan_of_2026(network(case), WAN, 1)
    path = save(tmp_path / "x.safetensors", tensors)
    strength = {"high_noise": 0.3, "low_noise": -1.25}
    experts = PhasedExperts.from_lora_files(PLAN, path, path, strength=strength)
    assert [expert.strength for expert in experts.manifest.experts] == [0.3, -1.25]
    networks = [network(case, name) for name in ("transformer", "transformer_2")]
    check(case, experts, [added(n, deltas, s) for n, s in zip(networks, strength.values(), strict=True)])


def test_set_adapters_for_a_lora_of_ones_own_leaves_the_scale_of_experts(tmp_path: Path) -> None:
    case = CASES["wan"]
    pairs = pairs_of(network(case), 1, LINEAR)
    path = save(tmp_path / "x.safetensors", with_alpha(LAYOUTS["native"](WAN, pairs), 1.0))
    pipe = attach_experts(case.build(), PhasedExperts.from_lora_files(PhasePlan.from_steps([2]), path))
    expected = case.sample(pipe)
    pipe.set_adapters(["phased_all_noise"], [1.0])
    torch.testing.assert_close(case.sample(pipe), expected, rtol=0, atol=0)


def test_a_file_that_only_one_phase_has_pairs_for(tmp_path: Path) -> None:
    """The other phase changes norms and biases alone."""
    case = CASES["wan"]
    tensors, deltas = wan_of_2026(network(case), WAN, 1)
    differences = {key: value for key, value in tensors.items() if ".diff" in key}
    plain = {name: value for name, value in deltas.items() if name.endswith(("bias", "table"))}
    plain |= {name: value for name, value in deltas.items() if "norm" in name or "patch" in name}
    paths = [save(tmp_path / "a.safetensors", tensors), save(tmp_path / "b.safetensors", differences)]
    experts = PhasedExperts.from_lora_files(PLAN, *paths, components=["transformer"] * 2)
    check(case, experts, [added(network(case), deltas), added(network(case), plain)])


def test_qwen_image_files_of_attention_alone_are_what_the_pipeline_is(tmp_path: Path) -> None:
    case = CASES["qwen_image"]
    pairs = pairs_of(network(case), 1, ("attn.to_q", "attn.to_v"))
    path = save(tmp_path / "x.safetensors", with_alpha(LAYOUTS["bare_diffusers"](case.family, pairs), 1.0))
    experts = PhasedExperts.from_lora_files(PhasePlan.from_steps([2]), path)
    assert experts.manifest.base.family == "unknown"
    check(case, experts, [added(network(case), deltas_of(pairs, 1.0 / RANK))])
    given = PhasedExperts.from_lora_files(PhasePlan.from_steps([2]), path, family="qwen_image")
    assert given.manifest.base.model == "Qwen/Qwen-Image"
    with pytest.raises(ExpertsError, match=r"are of a QwenImageTransformer2DModel .* the pipeline has a WanTransf"):
        attach_experts(CASES["wan"].build(), given)
    with pytest.raises(ExpertsError, match="do not tell their base: pass its Hub id or folder as base="):
        load_phased_pipeline(experts)
