from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline, WanPipeline
from safetensors import safe_open

from pdmd_core.experts import MANIFEST_NAME, ExpertsError, PhasedExperts, read_manifest
from pdmd_core.experts import verify as verify_module
from pdmd_core.experts.__main__ import main
from pdmd_core.experts.convert.conversions import Conversion
from pdmd_core.experts.verify import Check, SampleRequest, verify
from pdmd_core.families import family_of
from pdmd_core.hashing import sha256_of
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import Roles, RoleSpec
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.families.cases import OF_FAMILIES
from tests.helpers.families.parts import use_all_colours
from tests.helpers.tiny import CALL, lora_roles, randomise, transformer, wan_pipeline, write_lora_experts
from tests.helpers.tiny_experts import note_fingerprints

PLAN = PhasePlan.from_steps([2, 2], shift=5.0)
SIZE = [CALL["width"], CALL["height"], CALL["num_frames"]]
TRAINING = {"size": SIZE, "max_sequence_length": CALL["max_sequence_length"]}
PER_EXPERT = ("sha256", "metadata", "fits base", "values")


def write_folder(folder: Path, base: Path, plan: PhasePlan = PLAN) -> Path:
    write_lora_experts(folder, plan, lora_roles(plan, 4, 6.0), str(base), TRAINING)
    PhasedDMDScheduler.from_plan(plan).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock pipeline on disk; not to be changed."""
    return save(wan_pipeline(), tmp_path_factory.mktemp("base") / "wan")


def save(pipeline: DiffusionPipeline, folder: Path) -> Path:
    use_all_colours(pipeline.vae)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, base: Path) -> Path:
    return write_folder(tmp_path / "experts", base)


def failures(checks: list[Check]) -> dict[str, str]:
    assert all(len(check.detail.splitlines()) == 1 for check in checks)
    return {check.name: check.detail for check in checks if not check.passed}


def change_file(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], metadata: bool = True) -> None:
    """Change the low-noise expert's tensors and give the manifest the new hash."""
    manifest = read_manifest(folder)
    path = folder / "low_noise.safetensors"
    with safe_open(path, "pt") as file:
        carried = file.metadata()
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata=carried if metadata else {"phased_experts": "{}"})
    entries = tuple(replace(e, sha256=sha256_of(folder / e.file)) for e in manifest.experts)
    (folder / MANIFEST_NAME).write_text(replace(manifest, experts=entries).to_json())


def test_a_whole_folder_passes_every_check(folder: Path) -> None:
    checks = list(verify(folder))
    assert not failures(checks)
    expected = [f"{name}: {check}" for name in ("high_noise", "low_noise") for check in PER_EXPERT]
    assert [check.name for check in checks] == ["manifest", "scheduler", "base", *expected]
    details = {check.name: check.detail for check in checks}
    assert details["low_noise: fits base"] == "20 modules of transformer, rank 4, alpha 6"


def test_no_weights_of_the_base_are_needed(folder: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    assert not failures(list(verify(folder, str(tmp_path / "base"))))


NAN = "diffusion_model.blocks.1.ffn.2.lora_up.weight"
DOWN = NAN.replace("lora_up", "lora_down")
FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str, str]] = {
    "nan": (lambda t: t[NAN].view(-1)[3].fill_(float("nan")), "values", NAN),
    "infinity": (lambda t: t[NAN].view(-1)[3].fill_(float("inf")), "values", NAN),
    "alpha": (lambda t: t.update({NAN.replace("lora_up.weight", "alpha"): torch.tensor(4.0)}), "fits base", "alpha"),
    "rank": (lambda t: t.update({NAN: torch.zeros(24, 5)}), "fits base", "expected rank 4"),
    "width": (lambda t: t.update({NAN: torch.zeros(25, 4)}), "fits base", "takes (24, 4)"),
    "input": (lambda t: t.update({DOWN: torch.zeros(4, 33)}), "fits base", "takes (4, 32)"),
    "lacking": (lambda t: t.pop(NAN), "fits base", "every adapted module needs"),
    "partly": (
        lambda t: [t.pop(key) for key in [*t] if "blocks.1.ffn.2." in key],
        "fits base",
        "leaves out 1 of the modules that it targets, blocks.1.ffn.net.2 for one",
    ),
    "foreign": (lambda t: t.update(x=torch.zeros(1)), "fits base", "'x'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_fails_its_own_check_and_no_other(folder: Path, fault: str) -> None:
    change, check, fragment = FAULTS[fault]
    change_file(folder, change)
    found = failures(list(verify(folder)))
    assert set(found) == {f"low_noise: {check}"} and fragment in found[f"low_noise: {check}"]


def test_a_changed_file_fails_its_hash(folder: Path) -> None:
    path = folder / "low_noise.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    found = failures(list(verify(folder)))
    assert set(found) == {"low_noise: sha256"} and "was changed or cut off" in found["low_noise: sha256"]


def test_a_cut_file_fails_all_its_checks_and_the_others_still_run(folder: Path) -> None:
    path = folder / "low_noise.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert set(failures(list(verify(folder)))) == {f"low_noise: {check}" for check in PER_EXPERT}


def test_swapped_files_fail_hash_and_metadata(folder: Path) -> None:
    high, low = folder / "high_noise.safetensors", folder / "low_noise.safetensors"
    high.rename(folder / "x")
    low.rename(high)
    (folder / "x").rename(low)
    expected = {f"{name}: {check}" for name in ("high_noise", "low_noise") for check in ("sha256", "metadata")}
    assert set(failures(list(verify(folder)))) == expected


def test_a_file_without_this_manifest_in_it_fails(folder: Path) -> None:
    change_file(folder, lambda tensors: None, metadata=False)
    assert set(failures(list(verify(folder)))) == {"low_noise: metadata"}


def test_a_scheduler_of_another_plan_fails(folder: Path, tmp_path: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    PhasedDMDScheduler.from_plan(PhasePlan.from_steps([2, 2], shift=3.0)).save_pretrained(path.parent)
    assert set(failures(list(verify(folder)))) == {"scheduler"}
    for text in ("{", "[]"):
        path.write_text(text)
        assert set(failures(list(verify(folder)))) == {"scheduler"}
    shutil.rmtree(path.parent)
    assert "no such file: convert or download" in failures(list(verify(folder)))["scheduler"]
    (tmp_path / "elsewhere").mkdir()
    PhasedDMDScheduler.from_plan(PLAN).save_pretrained(tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    assert "a link that leaves the folder" in failures(list(verify(folder)))["scheduler"]


def test_a_base_that_does_not_fit_fails(folder: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "other")
    path = tmp_path / "other" / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_layers": 1}))
    found = failures(list(verify(folder, str(tmp_path / "other"))))
    assert set(found) == {"high_noise: fits base", "low_noise: fits base"} and "blocks.1." in str(found)
    path.write_text(json.dumps(config | {"_class_name": "SoraModel"}))
    found = failures(list(verify(folder, str(tmp_path / "other"))))
    assert set(found) == {"base"} and "SoraModel" in found["base"]
    found = failures(list(verify(folder, "nowhere/at/all")))
    assert set(found) == {"base"} and "give --base" in found["base"]


def test_a_base_with_other_weights_is_a_warning(
    folder: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def weights(of: Path | None) -> Check:
        return next(c for c in verify(folder, str(of) if of else None) if c.name == "transformer: weights")

    note_fingerprints(folder, {"transformer": transformer()})
    assert not failures(list(verify(folder)))
    assert weights(None) == Check("transformer: weights", True, "those of the base, by 26 samples")
    pipeline = WanPipeline.from_pretrained(base, dtype=torch.bfloat16)
    pipeline.save_pretrained(tmp_path / "half")
    assert weights(tmp_path / "half").detail == "those of the base, by 26 samples"
    pipeline.transformer.save_pretrained(tmp_path / "half/transformer", max_shard_size="30KB")
    assert weights(tmp_path / "half").detail == "those of the base, by 26 samples"
    assert len(list((tmp_path / "half/transformer").glob("*-of-*.safetensors"))) > 1
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter.mul_(1.03)
    pipeline.save_pretrained(tmp_path / "tuned")
    found = weights(tmp_path / "tuned")
    assert found.passed and found.warning and f"{tmp_path / 'tuned' / 'transformer'} has other weights" in found.detail
    assert f"the transformer of {base}, from which these experts were distilled: 26 of 26" in found.detail
    assert main(["verify", str(folder), "--base", str(tmp_path / "tuned")]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line[:26] for line in lines if line.startswith("warn")] == ["warn  transformer: weights"]
    assert last == "all 12 checks passed, 1 with a warning"
    shutil.copytree(base, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    assert weights(tmp_path / "configs").detail == "not here, not compared with the fingerprint"
    for file in (tmp_path / "tuned/transformer").glob("*.safetensors"):
        file.write_bytes(b"text")
    assert set(failures(list(verify(folder, str(tmp_path / "tuned"))))) == {"transformer: weights"}


def test_full_experts_are_held_to_every_weight_of_the_network(folder: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    Conversion(PhasedExperts.open(folder), full).to_full()
    assert not failures(list(verify(full)))
    for change, fragment in (
        (lambda t: t.pop("proj_out.bias"), "lacks proj_out.bias"),
        (lambda t: t.update({"proj_out.bias": torch.zeros(3)}), "proj_out.bias has shape (3,)"),
        (lambda t: t.update({"proj_out.bias": torch.zeros(64), "x": torch.zeros(1)}), "the unknown weight x"),
    ):
        change_file(full, change)
        found = failures(list(verify(full)))
        assert set(found) == {"low_noise: fits base"} and fragment in found["low_noise: fits base"]


def test_a_manifest_that_cannot_be_used_is_an_error(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_text("{")
    with pytest.raises(ExpertsError, match="not JSON"):
        list(verify(folder))


# --- sampling ---------------------------------------------------------------


def sample_check(folder: Path, base: str | None = None, **request: Any) -> Check:
    *others, check = verify(folder, base, SampleRequest(**request))
    assert not failures(others) and check.name == "sample"
    return check


@pytest.mark.parametrize("steps", [[3], [2, 2], [1, 1, 2]])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_stock_diffusers_samples_what_the_roles_sample(base: Path, tmp_path: Path, steps: list[int], kind: str) -> None:
    plan = PhasePlan.from_steps(steps, shift=5.0)
    folder = write_folder(tmp_path / "experts", base, plan)
    if kind == "full":
        Conversion(PhasedExperts.open(folder), tmp_path / "full").to_full()
        folder = tmp_path / "full"
    check = sample_check(folder)
    assert check.passed and check.detail.startswith("16x32, 5 frame(s): largest difference of a pixel ")
    assert float(check.detail.split("pixel ")[1].split()[0]) < 1e-4


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_experts_of_a_base_with_two_networks(folder: Path, tmp_path: Path, kind: str) -> None:
    pipeline = wan_pipeline()
    pipeline.register_modules(transformer_2=transformer(seed=9))
    pipeline.register_to_config(boundary_ratio=0.9)
    save(pipeline, tmp_path / "two")
    manifest = read_manifest(folder)
    second = replace(manifest.experts[1], component="transformer_2")
    changed = replace(manifest, experts=(manifest.experts[0], second))
    from pdmd_core.experts import write_experts

    weights = {e.name: PhasedExperts.open(folder).tensors(e.name) for e in manifest.experts}
    write_experts(folder, changed, weights)
    if kind == "full":
        Conversion(PhasedExperts.open(folder), tmp_path / "full", str(tmp_path / "two")).to_full()
        folder = tmp_path / "full"
    assert sample_check(folder, str(tmp_path / "two")).passed


def test_the_user_s_size_and_prompt_are_sampled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    call = WanPipeline.__call__

    def record(self: WanPipeline, **arguments: Any) -> Any:
        seen.update(arguments)
        return call(self, **arguments)

    record.__signature__ = __import__("inspect").signature(call)  # type: ignore[attr-defined]
    monkeypatch.setattr(WanPipeline, "__call__", record)
    check = sample_check(folder, prompt="a boat", size=(32, 16, 1), max_sequence_length=9)
    assert check.passed and check.detail.startswith("32x16, 1 frame(s)")
    assert (seen["prompt"], seen["width"], seen["height"], seen["num_frames"]) == ("a boat", 32, 16, 1)
    assert seen["max_sequence_length"] == 9 and seen["guidance_scale"] == 1.0


def test_a_difference_fails_and_is_stated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = verify_module._own_sample
    for change, passed in ((1e-6, True), (0.1, False), (float("nan"), False)):
        monkeypatch.setattr(verify_module, "_own_sample", lambda *a, change=change: own(*a) + change)
        check = sample_check(folder)
        assert check.passed == passed
        assert passed or "stock diffusers does not sample what these experts do here" in check.detail


def test_a_wrong_expert_in_the_stock_pipeline_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PhasedDMDScheduler, "phase", property(lambda self: 0))
    assert not sample_check(folder).passed


def test_bfloat16_finds_other_pictures_and_the_machine_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = sample_check(folder, dtype=torch.bfloat16, device="cpu")
    assert check.passed and float(check.detail.split("pixel ")[1].split()[0]) > 1e-5, check.detail
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PhasedDMDScheduler, "phase", property(lambda self: 0))
        assert not sample_check(folder, dtype=torch.bfloat16).passed
    assert "--offload is for a GPU, this samples on the CPU" in sample_check(folder, device="cpu", offload=True).detail
    assert sample_check(folder, device="nowhere").detail.startswith("cannot sample: ")
    full = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(verify_module, "_own_sample", lambda *_: (_ for _ in ()).throw(full))
    assert sample_check(folder).detail == (
        "out of memory (CUDA out of memory): use --dtype bfloat16, --offload, --device cpu, or a smaller --size"
    )


def test_a_size_that_the_model_does_not_have_fails_in_one_line(folder: Path) -> None:
    check = sample_check(folder, size=(17, 16, 1))
    assert not check.passed and "multiples of 16" in check.detail and len(check.detail.splitlines()) == 1


@pytest.mark.parametrize("name", [name for name in OF_FAMILIES if name != "wan"])  # it has tests of its own above
def test_every_family_is_sampled_the_same_before_and_after_merging(name: str, tmp_path: Path) -> None:
    case = OF_FAMILIES[name]
    pipeline, (height, width, frames) = case.build(), case.size
    base = str(save(pipeline, tmp_path / "base"))
    names = family_of(type(pipeline.transformer).__name__)
    roles = Roles(pipeline.transformer, names, {phase.name: RoleSpec("lora", 4, 6.0) for phase in PLAN.phases})
    for seed, phase in enumerate(PLAN.phases):
        randomise(roles, phase.name, seed)
    experts = tmp_path / "experts"
    training: dict[str, object] = {"pipeline_tag": "image-to-image"} if case.edits else {}
    if name == "wan_5b_image_to_video":  # of the same base as the one without a picture, which names another class
        training["pipeline"] = type(pipeline).__name__
        base = str(save(OF_FAMILIES["wan_5b"].build(), tmp_path / "named"))
    write_lora_experts(experts, PLAN, roles, base, training)
    PhasedDMDScheduler.from_plan(PLAN).save_pretrained(experts / "scheduler")
    request = {"size": (width, height, frames), "max_sequence_length": case.tokens}
    assert sample_check(experts, **request).passed
    Conversion(PhasedExperts.open(experts), tmp_path / "full").to_full()
    assert sample_check(tmp_path / "full", **request).passed
    try:
        names.native_weights(PhasedExperts.open(tmp_path / "full").tensors(PLAN.phases[0].name))
    except ValueError as reason:
        with pytest.raises(ExpertsError, match=re.escape(str(reason).partition("' ")[2] or str(reason))):
            Conversion(PhasedExperts.open(experts), tmp_path / "comfyui").to_comfyui()
        return
    manifest = Conversion(PhasedExperts.open(experts), tmp_path / "comfyui").to_comfyui()
    for expert in manifest.experts:
        written = safetensors.torch.load_file(tmp_path / "comfyui" / expert.file)
        full = PhasedExperts.open(tmp_path / "full").tensors(expert.name)
        native = {weight.name: weight for weight in names.native_weights(full)}
        assert set(native) == set(written)
        for name, weight in native.items():
            value = torch.cat([full[source] for source in weight.sources])
            assert torch.equal(written[name], torch.cat(value.chunk(2)[::-1]) if weight.swapped else value)


@pytest.mark.parametrize("training", [{"size": [17, 16, 1]}, {"size": [16, 16, 3]}])
def test_an_odd_training_summary_fails_in_one_line(folder: Path, training: dict[str, Any]) -> None:
    from pdmd_core.experts import write_experts

    manifest = replace(read_manifest(folder), training=training)
    weights = {e.name: PhasedExperts.open(folder).tensors(e.name) for e in manifest.experts}
    write_experts(folder, manifest, weights)
    check = sample_check(folder)
    assert not check.passed and "cannot sample" in check.detail and len(check.detail.splitlines()) == 1


def test_nothing_is_sampled_from_experts_that_failed(folder: Path) -> None:
    change_file(folder, FAULTS["nan"][0])
    checks = list(verify(folder, None, SampleRequest()))
    assert set(failures(checks)) == {"low_noise: values", "sample"} and checks[-1].detail.startswith("not run")
