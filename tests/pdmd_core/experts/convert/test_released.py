from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from pdmd_core.experts import ExpertsError, PhasedExperts
from pdmd_core.experts.convert.conversions import Conversion
from pdmd_core.experts.convert.released import open_lora
from pdmd_core.experts.lora.changes import Change
from pdmd_core.experts.verify import verify
from pdmd_core.families import FAMILIES, family
from pdmd_core.phases import PhasePlan
from pdmd_core.pipelines import attach_experts, detach_experts, load_phased_pipeline
from tests.helpers.lora_layouts import save, wan_of_2026
from tests.helpers.tiny import CALL, LATENT_SHAPE, randn, transformer, wan_pipeline

PLAN = PhasePlan.from_steps([2, 2], shift=5.0)
WAN = family("wan")
MODULES = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "ffn.0", "ffn.2")


def weights(seed: int, rank: int = 4) -> dict[str, tuple[Tensor, Tensor]]:
    """Native module of the tiny Wan transformer to a down and an up projection."""
    network, found = transformer(), {}
    for block in range(2):
        for i, module in enumerate(MODULES):
            name = f"blocks.{block}.{module}"
            size_out, size_in = network.get_submodule(WAN.diffusers_module_name(name)).weight.shape
            down, up = randn(rank, size_in, seed=seed + 50 * block + i), randn(size_out, rank, seed=seed + i + 7)
            found[name] = 0.2 * down, 0.2 * up
    return found


def lightning(path: Path, seed: int, alpha: float = 2.0) -> Path:
    """The keys of the released Wan2.2-Lightning files: native names, lora_down, lora_up and alpha."""
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in weights(seed).items():
        tensors[f"diffusion_model.{name}.lora_down.weight"] = down
        tensors[f"diffusion_model.{name}.lora_up.weight"] = up
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def two_network_pipeline() -> WanPipeline:
    one = wan_pipeline()
    components = {**one.components, "transformer_2": transformer(seed=9)}
    pipeline = WanPipeline(**components, boundary_ratio=0.875)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def merged(network: torch.nn.Module, seed: int, scale: float) -> torch.nn.Module:
    with torch.no_grad():
        for name, (down, up) in weights(seed).items():
            network.get_submodule(WAN.diffusers_module_name(name)).weight += scale * up @ down
    return network


def run(pipeline: WanPipeline) -> Tensor:
    call = {**CALL, "guidance_scale": 1.0, "num_inference_steps": 4, "output_type": "latent"}
    return pipeline(**call, generator=torch.Generator().manual_seed(3)).frames


@torch.no_grad()
def euler(pipeline: WanPipeline, experts: list[torch.nn.Module]) -> Tensor:
    conditioning = WAN.encode_prompts(pipeline, [CALL["prompt"]], CALL["max_sequence_length"])
    x = randn(1, *LATENT_SHAPE, seed=3)
    for sigma, following in zip(PLAN.sigmas, [*PLAN.sigmas[1:], 0.0], strict=True):
        x = x + (following - sigma) * WAN.velocity(experts[PLAN.phase_index(sigma)], x, sigma, conditioning)
    return x


def test_released_wan_files_sample_as_if_merged_with_alpha_over_rank(tmp_path: Path) -> None:
    high, low = lightning(tmp_path / "high.safetensors", 1), lightning(tmp_path / "low.safetensors", 2)
    experts = PhasedExperts.from_lora_files(PLAN, high=high, low=low)
    assert [e.component for e in experts.manifest.experts] == ["transformer", "transformer_2"]
    assert [(e.rank, e.alpha) for e in experts.manifest.experts] == [(4, 2.0), (4, 2.0)]
    assert experts.manifest.base.model == "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    pipeline = two_network_pipeline()
    expected = euler(pipeline, [merged(transformer(), 1, 2 / 4), merged(transformer(seed=9), 2, 2 / 4)])
    before = run(pipeline)
    attach_experts(pipeline, experts)
    torch.testing.assert_close(run(pipeline), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(run(detach_experts(pipeline)), before)
    assert pipeline.config.boundary_ratio == 0.875


def test_on_one_network_both_files_are_adapters_of_it(tmp_path: Path) -> None:
    high, low = lightning(tmp_path / "high.safetensors", 1), lightning(tmp_path / "low.safetensors", 2, alpha=4.0)
    experts = PhasedExperts.from_lora_files(PLAN, high, low, base="some/wan2.1", components=["transformer"] * 2)
    pipeline = attach_experts(wan_pipeline(), experts)
    expected = euler(pipeline, [merged(transformer(), 1, 2 / 4), merged(transformer(), 2, 1.0)])
    torch.testing.assert_close(run(pipeline), expected, rtol=1e-4, atol=1e-4)


def test_a_pipeline_with_released_files_is_saved_with_them(tmp_path: Path) -> None:
    files = {"high": lightning(tmp_path / "a.safetensors", 1), "low": lightning(tmp_path / "b.safetensors", 2)}
    pipeline = attach_experts(two_network_pipeline(), PhasedExperts.from_lora_files(PLAN, **files))
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = load_phased_pipeline(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(run(loaded), run(pipeline), rtol=1e-5, atol=1e-5)


def test_released_files_of_another_layout_keep_it_when_saved(tmp_path: Path) -> None:
    """No alpha, which is then the rank, and diffusers' own names."""
    halves = {"lora_A": randn(4, 24, seed=1), "lora_B": randn(24, 4, seed=2)}
    tensors = {f"transformer.blocks.0.attn1.to_q.{part}.weight": value for part, value in halves.items()}
    save_file(tensors, tmp_path / "one.safetensors")
    experts = PhasedExperts.from_lora_files(PhasePlan.from_steps([4], shift=5.0), tmp_path / "one.safetensors")
    pipeline = attach_experts(wan_pipeline(), experts)
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = load_phased_pipeline(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(run(loaded), run(pipeline), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (torch.tensor(float("nan")), "is not one positive number"),
        (torch.tensor(-2.0), "is not one positive number"),
        (torch.tensor(0.0), "is not one positive number"),
        (torch.ones(2), "is not one positive number"),
    ],
)
def test_an_alpha_that_scales_to_nonsense_is_refused(tmp_path: Path, alpha: Tensor, message: str) -> None:
    path = lightning(tmp_path / "high.safetensors", 1)
    save_file({k: alpha.clone() if k.endswith(".alpha") else v for k, v in load_file(path).items()}, path)
    with pytest.raises(ExpertsError, match=message):
        PhasedExperts.from_lora_files(PhasePlan.from_steps([4], shift=5.0), path)


def test_an_alpha_that_only_some_modules_have_goes_before_that_of_the_metadata(tmp_path: Path) -> None:
    path = lightning(tmp_path / "x.safetensors", 1)
    tensors, metadata = load_file(path), {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 2})}
    expected = {name: changes[0].dense() for name, changes in changes_in(path).items()}
    for name in MODULES[3:]:
        del tensors[f"diffusion_model.blocks.0.{name}.alpha"]
    save_file(tensors, path, metadata=metadata)
    found = changes_in(path)
    assert set(found) == set(expected)
    assert all(torch.equal(changes[0].dense(), expected[name]) for name, changes in found.items())


def changes_in(path: Path) -> Mapping[str, list[Change]]:
    return PhasedExperts.from_lora_files(PhasePlan.from_steps([4], shift=5.0), path).lora_changes("all_noise").weights


def test_each_module_is_scaled_by_its_own_alpha(tmp_path: Path) -> None:
    path = lightning(tmp_path / "mixed.safetensors", 1)
    own = {f"diffusion_model.blocks.{block}.ffn.0.alpha": torch.tensor(4.0) for block in range(2)}
    save_file(load_file(path) | own, path)
    experts = PhasedExperts.from_lora_files(PhasePlan.from_steps([4], shift=5.0), path)
    network = merged(transformer(), 1, 2 / 4)
    with torch.no_grad():
        for name, (down, up) in weights(1).items():
            if name.endswith("ffn.0"):
                network.get_submodule(WAN.diffusers_module_name(name)).weight += 2 / 4 * up @ down
    pipeline = wan_pipeline()
    expected = euler(pipeline, [network, network])
    torch.testing.assert_close(run(attach_experts(pipeline, experts)), expected, rtol=1e-4, atol=1e-4)


def test_only_safetensors_are_opened(tmp_path: Path) -> None:
    torch.save(load_file(lightning(tmp_path / "x.safetensors", 1)), tmp_path / "x.pt")
    with pytest.raises(ExpertsError, match=r"x.pt: only safetensors files are read, others can bring code"):
        open_lora(tmp_path / "x.pt")
    (tmp_path / "x.pt").rename(tmp_path / "renamed.safetensors")
    with pytest.raises(ExpertsError, match=r"renamed.safetensors: not a readable safetensors file"):
        open_lora(tmp_path / "renamed.safetensors")


def test_files_are_named_by_phase_for_any_plan(tmp_path: Path) -> None:
    plan = PhasePlan.from_steps([1, 1, 1], shift=5.0)
    files = {f"{n}_noise": lightning(tmp_path / f"{n}.safetensors", i) for i, n in enumerate(("high", "middle", "low"))}
    experts = PhasedExperts.from_lora_files(plan, **files)
    assert [experts.path(e.name) for e in experts.manifest.experts] == list(files.values())
    assert {e.component for e in experts.manifest.experts} == {"transformer"}
    one = PhasedExperts.from_lora_files(PhasePlan.from_steps([4], shift=3.0), files["high_noise"])
    assert [e.name for e in one.manifest.experts] == ["all_noise"]


def test_qwen_image_files_are_known_by_their_names(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for module in ("attn.to_q", "attn.add_q_proj", "img_mlp.net.0.proj", "txt_mod.1"):
        tensors[f"transformer_blocks.0.{module}.lora_down.weight"] = torch.zeros(4, 8)
        tensors[f"transformer_blocks.0.{module}.lora_up.weight"] = torch.zeros(8, 4)
        tensors[f"transformer_blocks.0.{module}.alpha"] = torch.tensor(8.0)
    save_file(tensors, tmp_path / "lightning.safetensors")
    plan = PhasePlan.from_steps([4], shift=3.0)
    experts = PhasedExperts.from_lora_files(plan, tmp_path / "lightning.safetensors")
    assert experts.manifest.base.architecture == "QwenImageTransformer2DModel"
    assert experts.manifest.experts[0].alpha == 8.0


def test_what_cannot_be_experts_is_said_in_one_line(tmp_path: Path) -> None:
    high, low = lightning(tmp_path / "high.safetensors", 1), lightning(tmp_path / "low.safetensors", 2)
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    save_file({"x.lora_down.weight": torch.zeros(2, 3)}, tmp_path / "half.safetensors")
    scalar = {"blocks.0.ffn.0.lora_down.weight": torch.tensor(1.0), "blocks.0.ffn.0.lora_up.weight": torch.tensor(1.0)}
    save_file(scalar, tmp_path / "scalar.safetensors")
    half = "transformer_blocks.0.img_mlp.net.2.lora"
    save_file({f"{half}_down.weight": torch.zeros(2, 3), f"{half}_up.weight": torch.zeros(3, 2)}, tmp_path / "qwen.sft")
    cases = {
        "phases high_noise, low_noise, found files for high_noise": {"high": high},
        "found files for high_noise, low_noise, other": {"high": high, "low": low, "other": low},
        "no such file": {"high": high, "low": tmp_path / "none.safetensors"},
        "not a LoRA file": {"high": high, "low": tmp_path / "weights.safetensors"},
        "every module needs a down and an up": {"high": high, "low": tmp_path / "half.safetensors"},
        "found high.safetensors: wan, qwen.sft: qwen_image": {"high": high, "low": tmp_path / "qwen.sft"},
        f"family is one of {', '.join(FAMILIES)}, found 'sora'": {
            "high": high,
            "low": low,
            "family": "sora",
        },
        "strength is given for 'middle', the plan has": {"high": high, "low": low, "strength": {"middle": 1.0}},
        "strength of low_noise is a number from -10 to 10": {"high": high, "low": low, "strength": {"low_noise": 11}},
        "expected here, such as https://huggingface.co/user/": {
            "high": high,
            "low": "https://huggingface.co/user/name",
        },
        "not a LoRA file: ": {"high": high, "low": tmp_path / "scalar.safetensors"},
        "expected here, found a folder": {"high": high, "low": tmp_path},
        "one component for each of the 2 experts": {"high": high, "low": low, "components": ["transformer"]},
    }
    for message, arguments in cases.items():
        with pytest.raises(ExpertsError, match=message) as caught:
            PhasedExperts.from_lora_files(PLAN, **arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(ExpertsError, match="two networks, this WanPipeline has one"):
        attach_experts(wan_pipeline(), PhasedExperts.from_lora_files(PLAN, high, low))


def test_released_files_are_verified_and_merged_with_all_that_they_change(tmp_path: Path) -> None:
    """A folder with them, as a saved pipeline is: full experts of it sample the same."""
    two_network_pipeline().save_pretrained(tmp_path / "base")
    files = {}
    for seed, end in enumerate(("high", "low"), start=1):
        tensors, _ = wan_of_2026(transformer(), WAN, seed)
        tensors["diffusion_model.blocks.0.cross_attn.norm_k_img.diff"] = torch.ones(24)
        files[end] = save(tmp_path / f"{end}.safetensors", tensors)
    strength = {"low_noise": 0.5}
    experts = PhasedExperts.from_lora_files(PLAN, **files, base=str(tmp_path / "base"), strength=strength)
    pipeline = attach_experts(two_network_pipeline(), experts)
    pipeline.save_pretrained(tmp_path / "saved")
    checks = {check.name: check for check in verify(tmp_path / "saved", str(tmp_path / "base"))}
    assert all(check.passed for check in checks.values() if check.name != "scheduler"), checks
    assert "norm_k_img.diff" in checks["low_noise: fits base"].detail and checks["low_noise: fits base"].warning
    warnings: list[str] = []
    saved = PhasedExperts.open(tmp_path / "saved")
    assert [expert.strength for expert in saved.manifest.experts] == [1.0, 0.5]
    manifest = Conversion(saved, tmp_path / "full", str(tmp_path / "base"), warn=warnings.append).to_full()
    assert [expert.strength for expert in manifest.experts] == [1.0, 1.0]
    assert "files" not in manifest.training and manifest.training["conversions"][0]["of"]
    assert len(warnings) == 2 and all("norm_k_img.diff" in line for line in warnings)
    full = load_phased_pipeline(tmp_path / "full")
    full.set_progress_bar_config(disable=True)
    torch.testing.assert_close(run(full), run(pipeline), rtol=1e-4, atol=1e-4)
