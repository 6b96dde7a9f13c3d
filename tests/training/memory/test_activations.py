"""Activations are predicted on tensors that hold nothing: against a real step, and what does not fit is refused."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch.profiler import ProfilerActivity, profile

from benchmarks.cost.random_training import TEXT_TOKENS, RandomTraining, small_config, small_teacher
from tests.helpers.configs import changed
from training.config.command_line import UserError
from training.config.schema import ConfigError, DistillConfig, load_config
from training.data.teacher import TeacherSource, family_of_pipeline, pipeline_on_meta
from training.loop.build import build_run
from training.loop.dry_run import describe
from training.loop.precision import make_accelerator
from training.loop.trainer import Trainer
from training.memory import activations
from training.memory.activations import activation_bytes, example_shapes

ROOT = Path(__file__).parents[3]


def allocated(events: Iterable[Any]) -> int:
    """The most bytes that the allocator gave out, of a profile."""
    sizes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(sizes, key=lambda pair: pair[0])))


def shapes_of(config: DistillConfig, teacher: Any) -> dict[str, tuple[int, ...]]:
    """Of an example's conditioning."""
    tokens = config.model.max_sequence_length
    return teacher.family.conditioning_shapes(teacher.networks["transformer"].config, tokens, teacher.shape)


def predicted_for(config: DistillConfig, teacher: Any) -> float:
    network = teacher.networks["transformer"]
    return activation_bytes(config, teacher.family, network, teacher.shape, shapes_of(config, teacher), 1)


THROUGH = {"fake_rollouts": "whole", "expert_rollouts": "through"}


@pytest.mark.parametrize(("steps", "objective"), [([1], {}), ([2], THROUGH), ([2], {"expert_loss": "denoising"})])
def test_predicted_are_those_of_a_real_step(steps: list[int], objective: dict[str, Any]) -> None:
    model = {"path": "random", "max_sequence_length": TEXT_TOKENS}
    config = small_config(batch_size=1, plan={"steps": steps, "shift": 5.0}, model=model, objective=objective)
    teacher = small_teacher("wan", "100M", 16)
    predicted = predicted_for(config, teacher)
    training = RandomTraining(config, teacher, make_accelerator("no", "cpu"))
    phase, batch = training.training, training.batches.draw(negative=True)
    renoising = training.batches.renoising(phase.distiller, batch.noise)
    for parameter in training.roles.parameters(phase.expert):
        parameter.grad = torch.zeros_like(parameter)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        if phase.distiller.denoises:
            loss = phase.distiller.denoising_loss(batch, renoising)
        else:
            loss = phase.distiller.generator_loss(phase.distiller.expert_rollout(batch, 0), batch, renoising).loss
        loss.backward()
    assert predicted == pytest.approx(allocated(found.profiler.kineto_results.events()), rel=0.1)


def test_what_a_longer_phase_records_counts() -> None:
    teacher = small_teacher("wan", "tiny", 16)
    predicted = {
        steps: predicted_for(small_config(plan={"steps": [*steps], "shift": 5.0}, objective=THROUGH), teacher)
        for steps in ((1,), (2,), (1, 2), (2, 1))
    }
    assert predicted[1, 2] == predicted[2, 1] == predicted[2,] > predicted[1,]


def test_what_computes_attention_of_other_networks_changes_no_prediction() -> None:
    teacher = small_teacher("wan", "tiny", 16)
    predicted = predicted_for(small_config(), teacher)
    with attention_backend("_native_math"):  # for the process, as set_attention_backend of any network does
        assert predicted_for(small_config(), teacher) == predicted


@pytest.mark.parametrize("checkpointing", [False, True])
def test_more_blocks_take_more_by_the_same_amount(monkeypatch: pytest.MonkeyPatch, checkpointing: bool) -> None:
    teacher = small_teacher("wan", "100M", 8)
    config = small_config(memory={"gradient_checkpointing": checkpointing})
    from_few = predicted_for(config, teacher)
    monkeypatch.setattr(activations, "_FEW", (9, 10))
    assert from_few == pytest.approx(predicted_for(config, teacher), rel=0.01)


def test_inputs_of_blocks_that_wait_in_host_memory_change_no_number(config: DistillConfig, tmp_path: Path) -> None:
    rows = []
    for name, offloaded in (("here", False), ("away", True)):
        settings = {"memory.gradient_checkpointing": True, "memory.offload_activations": offloaded}
        run = changed(config, output_dir=str(tmp_path / name), **settings)
        Trainer(build_run(run)).run()
        text = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8")
        rows.append([json.loads(line)["generator_grad_norm"] for line in text.splitlines()])
    assert rows[0] == rows[1]
    with pytest.raises(ConfigError, match=r"memory.offload_activations: is for inputs of blocks, with"):
        changed(config, **{"memory.offload_activations": True})


@pytest.mark.parametrize(
    ("recipe", "gpus", "overrides"),
    [
        ("wan2_2_t2v_a14b_phased_single_gpu", 1, ["model.height=720", "model.width=1280"]),
        ("wan2_2_t2v_a14b_phased", 8, []),
    ],
)
def test_what_fits_without_activations_alone_is_refused(
    recipe: str, gpus: int, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(ROOT / f"training/configs/{recipe}.yaml", overrides)
    with pytest.raises(UserError, match=r"does not fit: (8|9)\d\.\d+ GiB .* of it activations, 80 GiB given") as caught:
        describe(config, 80, gpus, advise=False)
    assert len(str(caught.value).splitlines()) == 1


def test_what_would_fit_is_named_and_fits(settings_of_run: dict[str, Any]) -> None:
    config = changed(settings_of_run, batch_size=4)

    def peak(config: DistillConfig) -> float:
        (found,) = re.findall(r"peak +([\d.]+) MiB", describe(config))
        return float(found)

    less = peak(changed(config, **{"memory.micro_batch_size": 1}))
    with pytest.raises(UserError, match=r"it fits with memory\.micro_batch_size: 1$"):
        describe(config, memory_per_gpu=(less + peak(config)) / 2 / 1024)


def test_a_network_that_cannot_be_evaluated_so_is_said(
    settings_of_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> float:
        raise RuntimeError("data-dependent")

    monkeypatch.setattr("training.loop.dry_run.activation_bytes", fails)
    assert "NOT counted, they come on top (RuntimeError: data-dependent)" in describe(changed(settings_of_run))


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("qwen_image_edit", {"prompt_embeds": (1024 + 37 * 37, 3584), "image_latents": (16, 1, 128, 128)}),
        ("qwen_image_edit_plus", {"prompt_embeds": (1024 + 14 * 14, 3584), "image_latents": (16, 1, 128, 128)}),
        ("flux_1_kontext_dev", {"prompt_embeds": (512, 4096), "image_latents": (16, 128, 128)}),
        ("flux_2_dev", {"prompt_embeds": (512, 15360), "image_latents": (128, 64, 64)}),
        ("wan2_2_ti2v_5b_image", {"prompt_embeds": (512, 4096), "first_frame": (48, 1, 44, 80)}),
        ("ltx_2_image", {"prompt_embeds": (1024, 3840), "first_frame": (128, 1, 16, 24)}),
        ("hunyuan_video_1_5_480p_image", {"image_embeds": (729, 1152), "image_latents": (32, 1, 30, 53)}),
    ],
)
def test_pictures_that_a_teacher_is_given_count(
    recipe: str, expected: dict[str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that it can do without, where the prompts have them."""
    monkeypatch.chdir(ROOT)
    changes = ["data.prompts=training/prompts/edits.jsonl"] if recipe == "flux_2_dev" else []
    config = load_config(ROOT / f"training/configs/{recipe}_phased.yaml", changes)
    model = config.model
    pipeline = pipeline_on_meta(TeacherSource(str(model.architecture), None, model.pipeline))
    found = family_of_pipeline(pipeline)
    latent = found.latent_shape(pipeline, model.height, model.width, model.frames)
    shapes = example_shapes(config, found, pipeline, latent)
    assert {name: shapes[name] for name in expected} == expected
    assert not changes or "image_latents" not in example_shapes(
        load_config(ROOT / f"training/configs/{recipe}_phased.yaml"), found, pipeline, latent
    )
