"""The model card: what it says, and that its code runs as written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline, WanTransformer3DModel
from huggingface_hub import ModelCard
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from pdmd_core.experts import BaseModel, Expert, ExpertsError, Manifest
from pdmd_core.experts.format.manifest import MANIFEST_NAME
from pdmd_core.experts.hub.card import card_text, is_generated, write_card
from pdmd_core.families import FAMILIES, family_of
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import Roles, RoleSpec
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.families.cases import BY_FAMILY, OF_FAMILIES
from tests.helpers.tiny import CALL, lora_roles, save_wan_pipeline, transformer, wan_pipeline, write_lora_experts

PLAN = PhasePlan.from_steps([2, 2], shift=5.0)
HUB_ID = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
SIZE = {"size": [CALL["width"], CALL["height"], CALL["num_frames"]], "max_sequence_length": CALL["max_sequence_length"]}


def manifest_of(
    plan: PhasePlan = PLAN,
    base: str = HUB_ID,
    kind: str = "lora",
    architecture: str = "WanTransformer3DModel",
    components: tuple[str, ...] = (),
    **training: object,
) -> Manifest:
    """A manifest without files."""
    lora: dict[str, Any] = {"rank": 4, "alpha": 6.0, "targets": ("attn1.to_q",)} if kind == "lora" else {}
    names = [phase.name for phase in plan.phases]
    experts = tuple(
        Expert(name, f"{name}.safetensors", kind, f"{i:064x}", component, **lora)  # type: ignore[arg-type]
        for i, (name, component) in enumerate(zip(names, components or ("transformer",) * len(names), strict=True))
    )
    return Manifest(BaseModel(base, architecture, "wan"), plan, experts, 1.0, training)


def metadata(text: str) -> dict[str, Any]:
    return ModelCard(text).data.to_dict()


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def written_experts(folder: Path, base: Path, **training: object) -> Manifest:
    """Experts with scheduler and card."""
    manifest = write_lora_experts(folder, PLAN, lora_roles(PLAN), str(base), {**SIZE, **training})
    PhasedDMDScheduler.from_plan(PLAN).save_pretrained(folder / "scheduler")
    assert write_card(folder, manifest) == folder / "README.md"
    return manifest


# --- metadata ------------------------------------------------------------


@pytest.mark.parametrize(("kind", "relation"), [("lora", "adapter"), ("full", "finetune")])
def test_metadata_names_the_base_and_how_the_experts_relate_to_it(kind: str, relation: str) -> None:
    data = metadata(card_text(manifest_of(kind=kind), "user/experts"))
    assert data["base_model"] == HUB_ID and data["base_model_relation"] == relation
    assert data["library_name"] == "diffusers"
    assert "phased-dmd" in data["tags"] and ("lora" in data["tags"]) == (kind == "lora")


def test_a_base_that_is_a_folder_is_no_hub_model(tmp_path: Path) -> None:
    text = card_text(manifest_of(base=str(tmp_path)), "user/experts")
    assert "base_model" not in text.split("---")[1]
    assert "is a folder of the machine that trained them" in text
    assert "is a folder of the machine" not in card_text(manifest_of(), "user/experts")


@pytest.mark.parametrize(
    ("architecture", "training", "task"),
    [
        ("WanTransformer3DModel", {}, "text-to-video"),
        ("WanTransformer3DModel", {"size": [64, 64, 9]}, "text-to-video"),
        ("WanTransformer3DModel", {"size": [64, 64, 1]}, "text-to-image"),
        ("QwenImageTransformer2DModel", {"size": [64, 64, 1]}, "text-to-image"),
        ("WanTransformer3DModel", {"pipeline_tag": "image-to-video"}, "image-to-video"),
        ("WanTransformer3DModel", {"pipeline_tag": "cooking", "size": "large"}, "text-to-video"),
    ],
)
def test_the_task_is_that_of_the_base_and_of_the_training(
    architecture: str, training: dict[str, object], task: str
) -> None:
    assert metadata(card_text(manifest_of(architecture=architecture, **training), "x"))["pipeline_tag"] == task


@pytest.mark.parametrize(
    ("training", "of_base", "expected", "words"),
    [
        ({"license": "mit"}, {"license": "apache-2.0"}, {"license": "mit"}, "`: mit."),
        ({}, {"license": "apache-2.0"}, {"license": "apache-2.0"}, "`: apache-2.0."),
        ({}, {}, {}, "is not known here"),
        ({"license": "other"}, {}, {}, "is not known here"),
        (
            {"license": "other", "license_name": "Big Lab 1.1", "license_link": "https://big.lab/terms"},
            {},
            {"license": "other", "license_name": "big-lab-1.1", "license_link": "https://big.lab/terms"},
            "[Big Lab 1.1](https://big.lab/terms)",
        ),
        (
            {},
            {"license": "other", "license_name": "big-lab"},
            {"license": "other", "license_name": "big-lab", "license_link": f"https://huggingface.co/{HUB_ID}"},
            f"[big-lab](https://huggingface.co/{HUB_ID})",
        ),
    ],
)
def test_the_licence_is_the_base_s_and_said_to_be_unknown_where_it_is(
    training: dict[str, object], of_base: dict[str, str], expected: dict[str, str], words: str
) -> None:
    text = card_text(manifest_of(**training), "user/experts", licence=of_base)
    found = {key: value for key, value in metadata(text).items() if key.startswith("license")}
    assert found == expected, "license: other needs a name and a link on the Hub"
    assert words in text.partition("## Licence")[2]


def test_a_licence_file_beside_the_experts_is_what_is_linked(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("terms")
    text = card_text(manifest_of(license="other", license_name="big-lab"), "x", tmp_path)
    assert metadata(text)["license_link"] == "LICENSE" and "[big-lab](LICENSE)" in text


# --- what it shows ------------------------------------------------------------


def test_the_card_shows_the_plan_the_files_and_the_training() -> None:
    manifest = manifest_of(updates=1234)
    text = card_text(manifest, "user/experts")
    assert PLAN.describe() in text and '"updates": 1234' in text
    for expert in manifest.experts:
        assert f"| {expert.file} | {expert.name} | lora | `{expert.sha256}` |" in text


def test_samples_are_shown_with_captions_under_relative_links(tmp_path: Path) -> None:
    assert "samples/" not in card_text(manifest_of(), "x", tmp_path)
    (tmp_path / "samples").mkdir()
    for name in ("a b.png", "clip.gif", "clip.png", "film.mp4", "notes.txt", "state.pt"):
        (tmp_path / "samples" / name).write_bytes(b"")
    (tmp_path / "samples" / "clip.txt").write_text("a panda [moves]\nleft <fast>\n", encoding="utf-8")
    text = card_text(manifest_of(), "x", tmp_path)
    assert "![a b](samples/a%20b.png)\n\n*a b*" in text
    assert "![a panda \\[moves\\] left \\<fast>](samples/clip.gif)" in text
    assert "\n[film](samples/film.mp4)" in text
    assert not [name for name in ("clip.png", "notes", "state") if name in text]


def test_measurements_are_those_of_the_report(tmp_path: Path) -> None:
    row = {"network_evaluations": 80, "frechet": 0.040204, "diversity": 46.1941, "seconds": 30.22}
    rows = [{"method": "teacher | 40", **row}, {"method": "experts", **row, "frechet": 12.3}]
    report = {"features": "FD-Emoji", "prompts": 48, "seeds": 10, "rows": rows}
    (tmp_path / "report.json").write_text(json.dumps(report))
    text = card_text(manifest_of(), "x", tmp_path)
    assert "| method | network evaluations | FD-Emoji to the teacher | diversity | seconds |\n| --- | ---: |" in text
    assert "| teacher \\| 40 | 80 | 0.0402 | 46.19 | 30.2 |" in text and "| experts | 80 | 12.3 |" in text
    assert "48 prompts, 10 seeds each." in text
    assert "## Measurements" not in card_text(manifest_of(), "x")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"rows": [{}]}', '{"rows": 3}', '{"rows": [{"method": "x", "frechet": "low"}]}']
)
def test_a_report_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ExpertsError, match=r"report\.json: not a report") as error:
        card_text(manifest_of(), "x", tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_comfyui_s_own_nodes_split_the_steps_at_the_phases() -> None:
    text = card_text(manifest_of(PhasePlan.from_steps([1, 2, 1], shift=3.0)), "x")
    assert "steps 4, cfg 1, shift 3 " in text and "LoraLoaderModelOnly" in text
    rows = re.findall(r"\| (\w+) \| (\w+) \| (\d) \| (\d) \| (\w+) \|", text)
    assert rows == [
        ("high_noise", "enable", "0", "1", "enable"),
        ("middle_noise", "disable", "1", "3", "enable"),
        ("low_noise", "disable", "3", "4", "disable"),
    ]


def test_sigmas_that_no_shift_gives_are_not_promised_to_comfyui_s_own_sampler() -> None:
    text = card_text(manifest_of(PhasePlan.from_sigmas([[1.0, 0.9], [0.5, 0.4]])), "x")
    assert "gives at no shift" in text and "end_at_step" not in text
    full = card_text(manifest_of(kind="full"), "x")
    assert "Load Diffusion Model" in full and "LoraLoaderModelOnly" not in full


def test_a_card_is_generated_until_its_line_is_deleted() -> None:
    text = card_text(manifest_of(), "x")
    assert is_generated(text)
    kept = [line for line in text.splitlines() if "Delete this line" not in line]
    assert len(kept) == len(text.splitlines()) - 1 and not is_generated("\n".join(kept))


# --- code ------------------------------------------------------------


@contextmanager
def calls() -> Iterator[list[tuple[int, list[str]]]]:
    """Each call of a transformer: its identity and its active adapters."""
    seen: list[tuple[int, list[str]]] = []

    def note(module: nn.Module, _: object) -> None:
        if isinstance(module, WanTransformer3DModel):
            seen.append((id(module), module.active_adapters()))

    handle = register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def test_the_first_code_is_three_lines_and_has_the_trained_size() -> None:
    first = python_blocks(card_text(manifest_of(**SIZE), "user/experts"))[0]
    assert first.splitlines() == [
        "from pdmd_core.pipelines import load_phased_pipeline",
        "",
        'pipe = load_phased_pipeline("user/experts")',
        'picture = pipe(prompt="a panda on a blue background", width=16, height=32, num_frames=5, '
        "max_sequence_length=12).frames[0]",
    ]
    pictures = manifest_of(architecture="QwenImageTransformer2DModel", size=[64, 32, 1])
    assert python_blocks(card_text(pictures, "x"))[0].endswith(", width=64, height=32).images[0]\n")


def test_the_first_code_runs_as_written(tmp_path: Path) -> None:
    written_experts(tmp_path / "experts", save_wan_pipeline(tmp_path / "base"))
    variables: dict[str, Any] = {}
    with calls() as seen:
        exec(python_blocks((tmp_path / "experts" / "README.md").read_text())[0], variables)  # noqa: S102
    expected = ["high_noise", "high_noise", "low_noise", "low_noise"]
    assert all(len(names) == 1 and names[0].endswith(name) for (_, names), name in zip(seen, expected, strict=True))
    assert variables["picture"].shape == (CALL["num_frames"], CALL["height"], CALL["width"], 3)


def test_the_code_for_stock_classes_runs_and_uses_each_expert_in_its_phase(tmp_path: Path) -> None:
    written_experts(tmp_path / "experts", save_wan_pipeline(tmp_path / "base"))
    variables: dict[str, Any] = {}
    with calls() as seen:
        exec(python_blocks((tmp_path / "experts" / "README.md").read_text())[1], variables)  # noqa: S102
    assert [names for _, names in seen] == [["high_noise"], ["high_noise"], ["low_noise"], ["low_noise"]]
    assert variables["result"].frames.shape == (1, CALL["num_frames"], CALL["height"], CALL["width"], 3)
    pipe = variables["pipe"]
    assert type(pipe) is WanPipeline and isinstance(pipe.scheduler, PhasedDMDScheduler)
    assert [float(t) for t in pipe.scheduler.timesteps] == pytest.approx([1000 * s for s in PLAN.sigmas])


@pytest.mark.parametrize("sigmas", [PLAN.sigmas, (1.0, 0.95454545, 0.875, 0.7)])
def test_the_code_for_two_networks_leaves_the_switch_to_the_pipeline_at_a_boundary_that_fits(
    tmp_path: Path, sigmas: tuple[float, ...]
) -> None:
    plan = PhasePlan.from_sigmas([sigmas[:2], sigmas[2:]])
    base = wan_pipeline()
    two = WanPipeline(**{**base.components, "transformer_2": transformer(seed=1)}, boundary_ratio=0.875)
    two.save_pretrained(tmp_path / "base")
    manifest = write_lora_experts(tmp_path / "experts", plan, lora_roles(plan), str(tmp_path / "base"), SIZE)
    PhasedDMDScheduler.from_plan(plan).save_pretrained(tmp_path / "experts" / "scheduler")
    high, low = manifest.experts
    write_card(tmp_path / "experts", replace(manifest, experts=(high, replace(low, component="transformer_2"))))
    variables: dict[str, Any] = {}
    with calls() as seen:
        exec(python_blocks((tmp_path / "experts" / "README.md").read_text())[1], variables)  # noqa: S102
    pipe: DiffusionPipeline = variables["pipe"]
    first, second = id(pipe.transformer), id(pipe.transformer_2)
    assert seen == [(first, ["high_noise"])] * 2 + [(second, ["low_noise"])] * 2


@pytest.mark.parametrize("networks", [1, 2])
def test_both_codes_sample_at_the_strengths_of_the_manifest(networks: int, tmp_path: Path) -> None:
    plan = PhasePlan.from_sigmas([[1.0, 0.95], [0.875, 0.7]])
    pipe = wan_pipeline()
    if networks == 2:
        pipe = WanPipeline(**{**pipe.components, "transformer_2": transformer(seed=1)}, boundary_ratio=0.875)
    pipe.save_pretrained(tmp_path / "base")
    folder, found = tmp_path / "experts", []
    manifest = write_lora_experts(folder, plan, lora_roles(plan), str(tmp_path / "base"), SIZE)
    PhasedDMDScheduler.from_plan(plan).save_pretrained(folder / "scheduler")
    high, low = manifest.experts
    low = replace(low, component="transformer_2") if networks == 2 else low
    for strengths in ((1.0, 1.0), (0.3, -2.0)):
        experts = tuple(replace(e, strength=s) for e, s in zip((high, low), strengths, strict=True))
        changed = replace(manifest, experts=experts)
        (folder / MANIFEST_NAME).write_text(changed.to_json(), encoding="utf-8")
        for block, name in zip(
            python_blocks(write_card(folder, changed).read_text()), ("picture", "result"), strict=True
        ):
            variables: dict[str, Any] = {}
            torch.manual_seed(0)
            exec(block, variables)  # noqa: S102
            frames = variables[name] if name == "picture" else variables[name].frames[0]
            found.append(torch.tensor(frames))
        torch.testing.assert_close(found[-2], found[-1], rtol=0, atol=1e-4)
    assert (found[0] - found[2]).abs().max() > 0.01, "strengths matter"


def test_comfyui_s_own_loader_is_told_the_strengths() -> None:
    manifest = manifest_of()
    high, low = manifest.experts
    for strengths, words in (((0.8, 0.8), "at strength 0.8\n"), ((0.8, 1.0), "0.8 (high_noise), 1 (low_noise)\n")):
        experts = tuple(replace(e, strength=s) for e, s in zip((high, low), strengths, strict=True))
        assert words in card_text(replace(manifest, experts=experts), "x")
    assert "on the base at strength 1\n" in card_text(manifest, "x")


OF_PICTURES = {
    "wan_5b_image_to_video": "wan_5b",
    "ltx2_image_to_video": "ltx2",
    "hunyuan_video_15_image_to_video": "hunyuan_video_15_image_to_video",
}
"""Cases to those of the base, whose own class may take no picture."""


@pytest.mark.parametrize("name", [*(next(iter(BY_FAMILY[name])) for name in FAMILIES), *OF_PICTURES])
def test_the_code_of_every_family_evaluates_its_network_once_a_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, base = OF_FAMILIES[name], OF_FAMILIES[OF_PICTURES.get(name, name)]
    pipeline, (height, width, frames) = base.build(), case.size
    pipeline.save_pretrained(tmp_path / "base")
    found = family_of(type(pipeline.transformer).__name__)
    roles = Roles(pipeline.transformer, found, {phase.name: RoleSpec("lora", 4, 6.0) for phase in PLAN.phases})
    training: dict[str, object] = {"size": [width, height, frames], "max_sequence_length": case.tokens}
    if name in OF_PICTURES:
        training |= {"pipeline_tag": "image-to-video", "pipeline": type(case.build()).__name__}
        case.picture.save(tmp_path / "image.png")
        monkeypatch.chdir(tmp_path)
    manifest = write_lora_experts(tmp_path / "experts", PLAN, roles, str(tmp_path / "base"), training)
    PhasedDMDScheduler.from_plan(PLAN).save_pretrained(tmp_path / "experts" / "scheduler")
    blocks = python_blocks(write_card(tmp_path / "experts", manifest).read_text())
    assert len(blocks) == 2
    evaluated: list[int] = []

    def count(module: nn.Module, _: object, output: Any) -> None:
        if type(module) is type(pipeline.transformer):
            evaluated.append(len(output[0]))

    handle = register_module_forward_hook(count)
    try:
        for block in blocks:
            evaluated.clear()
            exec(block, {})  # noqa: S102
            assert sum(evaluated) == len(PLAN.sigmas), block
    finally:
        handle.remove()


def test_experts_that_stock_classes_cannot_switch_have_no_code_for_them() -> None:
    components = ("transformer_2", "transformer")
    assert len(python_blocks(card_text(manifest_of(components=components), "x"))) == 1
    assert len(python_blocks(card_text(manifest_of(kind="full", components=components), "x"))) == 1


def test_the_code_is_python_whatever_the_prompt_and_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / 'a "quoted" folder'
    folder.mkdir()
    manifest = manifest_of(base=str(tmp_path))
    manifest = replace(manifest, base=replace(manifest.base, revision='v"1'))
    write_card(folder, manifest, prompt='a sign that says "hello"\\ and {braces}')
    blocks = python_blocks((folder / "README.md").read_text(encoding="utf-8"))
    codes = [compile(block, "card", "exec") for block in blocks]
    assert all('a sign that says "hello"\\ and {braces}' in code.co_consts for code in codes)
    assert all(folder.as_posix() in code.co_consts for code in codes)
    assert 'v"1' in codes[1].co_consts
