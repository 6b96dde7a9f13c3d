"""Whole distillations of tiny teachers of every kind: trained, resumed, exported, and loaded by the stock pipeline."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from pdmd_core.experts import ExpertsError, PhasedExperts
from pdmd_core.families import family_of
from pdmd_core.pipelines import attach_experts
from pdmd_core.roles import FAKE
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.configs import changed
from tests.helpers.families.case import Case
from tests.helpers.families.cases import OF_FAMILIES as CASES
from tests.helpers.families.cases import RESUMED
from tests.helpers.families.wan import wan_5b
from tests.helpers.interrupted import run_and_stop
from tests.helpers.prompt_files import write_prompts
from tests.helpers.tiny import wan_pipeline
from training.config.schema import ConfigError, DistillConfig
from training.data.buckets import SampleSize
from training.data.examples import Example, PromptError, read_examples
from training.evaluation.sampler import Sampler
from training.loop import trainer as trainer_module
from training.loop.build import build_run
from training.loop.resumption import Resume
from training.loop.trainer import Trainer
from training.monitoring import observer

every_case = pytest.mark.parametrize("name", CASES)


def has_two(name: str) -> bool:
    pipeline = CASES[name].build()
    return len(family_of(type(pipeline.transformer).__name__).teacher_routing(pipeline.config).components) == 2


TWO = [name for name in CASES if has_two(name)]


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt is validated, and files of samples have a corner of them: the rest takes most of the time."""
    monkeypatch.setattr("training.data.training_data.VALIDATED", 1)
    for module, name in ((trainer_module, "save_samples"), (observer, "save_small")):
        save = getattr(module, name)
        corner = lambda path, pixels, columns, save=save: save(path, pixels[:, :2, :, :16, :16], columns)  # noqa: E731
        monkeypatch.setattr(module, name, corner)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    for name, case in CASES.items():
        case.build().save_pretrained(folder / name)
    return {name: folder / name for name in CASES}


Distilled = Callable[[str], tuple[DistillConfig, PhasedExperts]]


@pytest.fixture(scope="module")
def distilled(teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Distilled:
    """A whole run of the case of a name, once: not to be changed."""

    @functools.cache
    def run(name: str) -> tuple[DistillConfig, PhasedExperts]:
        config = config_of(name, teachers[name], tmp_path_factory.mktemp(name))
        return config, PhasedExperts.open(Trainer(build_run(config)).run())

    return run


def config_of(name: str, teacher: Path, folder: Path, **changes: Any) -> DistillConfig:
    case = CASES[name]
    height, width, frames = case.size
    role = {"kind": "lora", "rank": 4, "alpha": 6, "lr": 1e-2}
    model = {"path": str(teacher), "height": height, "width": width, "frames": frames}
    settings = {
        "model": {**model, "max_sequence_length": case.tokens},
        "data.prompts": str(write_prompts(folder, "image" in case.call, case.last_image)),
        "data.negative_prompt": "blurry",
        "plan": {"steps": [2, 2], "shift": 5.0},
        "objective": {"guidance_scale": 2.0},
        "generator": role,
        "fake": role,
        "updates": 2,
        "batch_size": 4,
        "fake_updates": 1,
        "monitoring.tracker": None,
        "monitoring.log_every": 1,
        "checkpoints.every": 1,
        "checkpoints.keep": 10,
        "validation.every": None,
        "validation.seeds": 1,
        "output_dir": str(folder / "run"),
    }
    return changed({}, **settings | changes)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) | {"time": None}
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def sampled(
    name: str, config: DistillConfig, experts: PhasedExperts, folder: Path
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Latents with the experts and with the teacher by our own sampler, and the same call for a stock pipeline."""
    case, (height, width, frames) = CASES[name], CASES[name].size
    example = read_examples(config.data.prompts)[1]
    size = SampleSize(height, width, frames, case.tokens)
    sampler = Sampler(
        str(config.model.path),
        size,
        [Example("another", example.image, last_image=example.last_image), example],
        folder / "cache",
        experts,
        device="cpu",
    )
    found = sampler.with_experts([(1, 7)], progress=None)
    steps = len(experts.manifest.plan.sigmas)
    teachers_own = sampler.with_teacher([(1, 7)], steps, 5.0, 1.0, progress=None)
    call = {**case.call, **case.unguided, "prompt": example.prompt}
    call |= {"num_inference_steps": steps, "output_type": "latent"}
    for name, image in (("image", example.image), ("last_image", example.last_image)):
        if image is not None:
            call[name] = cut(Image.open(image).convert("RGB"), width, height)
    return found, teachers_own, call


def cut(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of an image that has the aspect ratio of the samples, in their size."""
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


@torch.no_grad()
def stock_sample(case: Case, teacher: Path, experts: PhasedExperts, call: dict[str, Any]) -> torch.Tensor:
    """By stock diffusers: its own LoRA loading, its own loop, our scheduler, latents as they come."""
    pipe = DiffusionPipeline.from_pretrained(teacher, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = PhasedDMDScheduler.from_pretrained(experts.folder, subfolder="scheduler")
    family = family_of(type(pipe.transformer).__name__)
    for expert in experts.manifest.experts:
        family.load_lora(pipe, experts.folder, expert.component, weight_name=expert.file, adapter_name=expert.name)
    names = [expert.name for expert in experts.manifest.experts]
    two = len({expert.component for expert in experts.manifest.experts}) > 1

    def use_expert_of_next_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if not two:  # a pipeline of two networks switches by itself
            pipe.transformer.set_adapters(names[pipe.scheduler.phase])
        return tensors

    if not two:
        pipe.transformer.set_adapters(names[0])
    case.guide(pipe, 1.0)
    if "callback_on_step_end" in family.call_lacks:
        pipe.transformer.register_forward_pre_hook(lambda n, *_: n.set_adapters(names[pipe.scheduler.phase]))
    else:
        call = {**call, "callback_on_step_end": use_expert_of_next_step}
    return case.result(pipe, pipe(**call, generator=torch.Generator().manual_seed(7)))


@every_case
def test_a_distillation_ends_in_experts_that_the_stock_pipeline_samples_with(
    name: str, teachers: dict[str, Path], distilled: Distilled, tmp_path: Path
) -> None:
    case, teacher = CASES[name], teachers[name]
    config, experts = distilled(name)
    tag = f"image-to-{'video' if case.size[2] > 1 else 'image'}" if case.takes("image") else None
    assert experts.manifest.training.get("pipeline_tag") == tag
    components = [expert.component for expert in experts.manifest.experts]
    assert components == (["transformer", "transformer_2"] if name in TWO else ["transformer"] * 2)
    for expert in experts.manifest.experts:
        ups = [value for key, value in experts.lora_state(expert.name).items() if key.endswith("lora_B")]
        assert sum(bool(value.any()) for value in ups) > len(ups) // 2, "trained"

    found, teachers_own, call = sampled(name, config, experts, tmp_path)
    expected = stock_sample(case, teacher, experts, call)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - teachers_own).abs().max() > case.moved, "experts are not the teacher"


@pytest.mark.parametrize("name", [name for name in CASES if name != "wan"])  # it has tests of its own
def test_a_stopped_run_resumes_to_the_same_numbers(
    name: str, teachers: dict[str, Path], distilled: Distilled, tmp_path: Path
) -> None:
    """Stopped in the last phase where the family has no other case."""
    whole, _ = distilled(name)
    data = {"data.prompts": whole.data.prompts, "data.cache_dir": str(whole.output_dir / "cache")}
    broken = config_of(name, teachers[name], tmp_path, **data)
    run_and_stop(Trainer(build_run(broken)), 3 if name in RESUMED else 1)
    Trainer(build_run(broken, Resume())).run()
    assert metrics(whole.output_dir) == metrics(broken.output_dir)


@pytest.mark.parametrize("name", TWO)
def test_the_fake_of_two_networks_learns_on_both_and_each_expert_on_its_own(
    name: str, teachers: dict[str, Path], tmp_path: Path
) -> None:
    trainer = Trainer(
        build_run(config_of(name, teachers[name], tmp_path, batch_size=6, score_groups=6, fake_updates=3))
    )
    bases = {c: {k: v.clone() for k, v in trainer.roles.base_state_dict(c).items()} for c in trainer.roles.bases}
    for phase, expert, component in ((0, "high_noise", "transformer"), (1, "low_noise", "transformer_2")):
        trainer.progress.phase = phase
        trainer.start_phase()
        trainer.update()
        assert trainer.roles.components(expert) == (component,)
        moved = {k.partition(".")[0] for k, v in trainer.roles.state_dict(FAKE).items() if "lora_B" in k and v.any()}
        assert moved == {"transformer", "transformer_2"}
        assert any(v.any() for k, v in trainer.roles.state_dict(expert).items() if "lora_B" in k)
    for component, before in bases.items():
        assert all(torch.equal(before[k], v) for k, v in trainer.roles.base_state_dict(component).items())


@pytest.mark.parametrize("name", TWO)
def test_what_two_networks_sample_with_guidance_is_learned_on_each_and_taught_by_both(
    name: str, teachers: dict[str, Path], tmp_path: Path
) -> None:
    memory = {"memory.micro_batch_size": 1, "memory.gradient_checkpointing": True}
    denoising = {"objective": {"expert_loss": "denoising", "path_steps": 1, "guidance_scale": 2.0}, "rollouts.bank": 5}
    first = config_of(name, teachers[name], tmp_path, **denoising, **memory, **{"memory.offload_idle_network": True})
    experts = PhasedExperts.open(Trainer(build_run(first)).run())
    assert [expert.component for expert in experts.manifest.experts] == ["transformer", "transformer_2"]
    for expert in experts.manifest.experts:
        assert any(v.any() for key, v in experts.lora_state(expert.name).items() if key.endswith("lora_B"))
    own = {
        "model.experts": str(experts.folder),
        "objective.guidance_scale": 1.0,
        "output_dir": str(tmp_path / "taught"),
    }
    trainer = Trainer(build_run(config_of(name, teachers[name], tmp_path, **own)))
    assert [e.component for e in PhasedExperts.open(trainer.run()).manifest.experts] == ["transformer", "transformer_2"]
    assert trainer.progress.bad == 0


@pytest.mark.parametrize("name", TWO)
def test_a_phase_on_both_sides_of_the_teacher_s_boundary_needs_a_choice(
    name: str, teachers: dict[str, Path], tmp_path: Path
) -> None:
    plan = {"steps": [4], "shift": 5.0}
    with pytest.raises(ConfigError, match=r"phase 'all_noise' runs at sigmas 1 to 0\.625, on both sides") as caught:
        Trainer(build_run(config_of(name, teachers[name], tmp_path, plan=plan)))
    assert "generator.components" in str(caught.value) and len(str(caught.value).splitlines()) == 1
    role = {"kind": "lora", "rank": 4, "alpha": 6, "lr": 1e-2, "components": ["transformer"]}
    config = config_of(name, teachers[name], tmp_path, plan=plan, generator=role)
    experts = PhasedExperts.open(Trainer(build_run(config)).run())
    assert [expert.component for expert in experts.manifest.experts] == ["transformer"]
    found, teachers_own, call = sampled(name, config, experts, tmp_path)
    pipe = attach_experts(DiffusionPipeline.from_pretrained(teachers[name]), experts)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(**call, generator=torch.Generator().manual_seed(7))[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - teachers_own).abs().max() > 0.02, "one network with its expert, at all sigmas"


def test_a_component_that_the_teacher_does_not_have_is_one_line(teachers: dict[str, Path], tmp_path: Path) -> None:
    role = {"kind": "lora", "rank": 4, "alpha": 6, "lr": 1e-2, "components": ["transformer_2"]}
    with pytest.raises(ConfigError, match=r"generator\.components: the teacher has no transformer_2") as caught:
        Trainer(build_run(config_of("qwen_image", teachers["qwen_image"], tmp_path, generator=role)))
    assert len(str(caught.value).splitlines()) == 1
    both, two = {"generator.components": ["transformer", "transformer_2"]}, "wan_two"
    with pytest.raises(ConfigError, match="an expert stands on one network, found two: give transformer or transf"):
        build_run(config_of(two, teachers[two], tmp_path, **both))


def test_a_fake_of_one_network_is_asked_at_all_sigmas(teachers: dict[str, Path], tmp_path: Path) -> None:
    name = "wan_two"
    config = config_of(name, teachers[name], tmp_path, updates=1, **{"fake.components": ["transformer_2"]})
    trainer = Trainer(build_run(config))
    before = {key: value.clone() for key, value in trainer.roles.state_dict(FAKE).items()}
    assert trainer.roles.components(FAKE) == ("transformer_2",)
    trainer.run()
    after = trainer.roles.state_dict(FAKE)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert [row["bad_updates"] for row in metrics(tmp_path / "run")] == [0, 0]


@pytest.mark.parametrize("name", RESUMED)
def test_full_copies_train_and_reset(name: str, teachers: dict[str, Path], tmp_path: Path) -> None:
    role = {"kind": "full", "lr": 1e-4}
    config = config_of(name, teachers[name], tmp_path, generator=role, fake=role, updates=1)
    trainer = Trainer(build_run(config))
    experts = PhasedExperts.open(trainer.run())
    components = ("transformer", "transformer_2") if name in TWO else ("transformer",) * 2
    for expert, component in zip(experts.manifest.experts, components, strict=True):
        assert (expert.kind, expert.component) == ("full", component)
        base, trained = trainer.roles.base_state_dict(component), experts.tensors(expert.name)
        assert set(base) == set(trained)
        assert any(not torch.equal(base[key], trained[key]) for key in base)


def test_experts_of_two_networks_do_not_load_on_one(teachers: dict[str, Path], tmp_path: Path) -> None:
    config = config_of("wan_two", teachers["wan_two"], tmp_path, updates=1)
    experts = PhasedExperts.open(Trainer(build_run(config)).run())
    wan_pipeline().save_pretrained(tmp_path / "one")
    with pytest.raises(ExpertsError, match="'low_noise' belongs to transformer_2") as caught:
        Sampler(str(tmp_path / "one"), SampleSize(16, 32, 5, 12), ["x"], tmp_path / "cache", experts)
    assert len(str(caught.value).splitlines()) == 1


def test_a_pipeline_class_of_choice_makes_the_5b_teacher_an_image_to_video_one(
    teachers: dict[str, Path], tmp_path: Path
) -> None:
    wan_5b().save_pretrained(tmp_path / "5b")
    config = config_of("wan_5b_image_to_video", tmp_path / "5b", tmp_path)
    with pytest.raises(PromptError, match=r"WanPipeline takes no images, 3 prompts have one; leave them out"):
        Trainer(build_run(config))
    model = {**config.model.model_dump(mode="json"), "pipeline": "WanImageToVideoPipeline"}
    trainer = Trainer(build_run(config_of("wan_5b_image_to_video", tmp_path / "5b", tmp_path, model=model)))
    conditioning = trainer.built.data.prompts.conditioning(torch.arange(3), torch.device("cpu"))
    assert conditioning["first_frame"].shape == (3, 48, 1, 2, 4)


def test_prompts_without_images_and_sample_prompts_are_refused_by_image_teachers(
    teachers: dict[str, Path], tmp_path: Path
) -> None:
    name = "wan_two_image_to_video"
    (tmp_path / "p.txt").write_text("a panda\na fox\n", encoding="utf-8")
    with pytest.raises(PromptError, match="takes an image with each prompt, 2 of 2 have none") as caught:
        Trainer(build_run(config_of(name, teachers[name], tmp_path, **{"data.prompts": str(tmp_path / "p.txt")})))
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(PromptError, match=r"validation\.prompts: the teacher takes images"):
        Trainer(build_run(config_of(name, teachers[name], tmp_path, **{"validation.prompts": ["a fox"]})))


def test_a_teacher_that_can_do_without_images_has_them_with_all_prompts_or_with_none(
    teachers: dict[str, Path], tmp_path: Path
) -> None:
    name = "flux2_klein_edit"
    path = write_prompts(tmp_path, images=True)
    path.write_text(path.read_text(encoding="utf-8") + '\n{"prompt": "a fox"}\n', encoding="utf-8")
    with pytest.raises(PromptError, match="with an image each or without any, 1 of 4 have none: make two") as caught:
        config = config_of("flux2_klein", teachers[name], tmp_path, **{"data.prompts": str(path), "model.height": 64})
        Trainer(build_run(changed(config, **{"model.width": 96})))
    assert len(str(caught.value).splitlines()) == 1
