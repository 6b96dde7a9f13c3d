"""Every recipe is described from configs alone: nothing is downloaded, nothing is allocated."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pdmd_core.families import family
from pdmd_core.roles import FAKE, Roles
from tests.tiny_families import wan_two_networks
from training.command_line import UserError
from training.config import ConfigError, load_config, parse_config
from training.dry_run import describe, pipeline_on_meta
from training.teacher import TeacherError, TeacherSource, networks_of

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "training" / "configs"
MODELS = {
    "wan2_1_t2v_14b": ("14.29 G parameters", "16x21x60x104"),
    "wan2_1_t2v_1_3b": ("1.42 G parameters", "16x21x60x104"),
    "wan2_2_t2v_a14b": ("28.58 G parameters", "16x21x60x104"),
    "wan2_2_i2v_a14b": ("28.58 G parameters", "16x21x60x104"),
    "qwen_image": ("20.43 G parameters", "16x1x166x166"),
}
"""Parameters of the teacher and latents of a sample."""
RECIPES = ("phased", "phased_single_gpu", "dmd_sgts")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_every_recipe_says_what_it_takes(model: str, recipe: str) -> None:
    config = load_config(CONFIGS / f"{model}_{recipe}.yaml")
    single = recipe == "phased_single_gpu"
    text = describe(config, memory_per_gpu=80 if single else None)
    parameters, latents = MODELS[model]
    assert parameters in text and f"latents {latents}" in text
    assert ("transformer_2 below" in text) == ("a14b" in model)
    assert text.count("network evaluations each") == len(config.plan.build()) == (1 if recipe == "dmd_sgts" else 2)
    if not single and model != "wan2_1_t2v_1_3b":
        with pytest.raises(UserError, match=r"does not fit: .* GiB .*80 GiB given; the largest is fake") as caught:
            describe(config, memory_per_gpu=80)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("model", MODELS)
def test_recipes_have_the_paper_s_settings(model: str) -> None:
    for recipe in ("phased", "dmd_sgts"):
        config = load_config(CONFIGS / f"{model}_{recipe}.yaml")
        generator, fake = config.generator, config.fake
        assert (generator.kind, generator.rank, generator.alpha, generator.lr) == ("lora", 64, 8, 5e-5)
        assert (fake.kind, fake.lr, config.fake_updates) == ("full", 4e-7, 5)
        assert generator.betas == fake.betas == (0, 0.999) and generator.weight_decay == fake.weight_decay == 0.01
        assert generator.max_grad_norm == fake.max_grad_norm == 1
        sigmas = [1, 0.9, 0.75, 0.5] if model == "qwen_image" else [1, 0.9375, 5 / 6, 0.625]
        assert config.plan.build().sigmas == pytest.approx(sigmas)


def test_bytes_are_those_of_the_real_roles(settings_of_run: dict[str, Any], tmp_path: Path) -> None:
    """Against tensors counted on a real tiny teacher of two networks, after its optimizers made a step."""
    pipeline = wan_two_networks()
    pipeline.save_pretrained(tmp_path / "two")
    settings_of_run["model"] |= {"path": str(tmp_path / "two")}
    config = parse_config(settings_of_run | {"plan": {"steps": [2, 2], "shift": 5.0}, "ema_decay": None}, "test")
    routing = family("wan").teacher_routing(pipeline.config)
    roles = Roles(networks_of(pipeline, family("wan")), family("wan"), config.role_specs(routing), routing)
    total = sum(v.numel() * v.element_size() for name in roles.bases for v in roles.base_state_dict(name).values())
    total += sum(p.numel() * p.element_size() for p in roles.parameters("high_noise"))
    roles.set_trainable(["low_noise", FAKE])
    for role in ("low_noise", FAKE):
        parameters = roles.parameters(role)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer = torch.optim.AdamW(parameters)
        optimizer.step()
        moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
        total += sum(t.numel() * t.element_size() for t in [*parameters, *(p.grad for p in parameters), *moments])
    (found,) = re.findall(r"all +([\d.]+) MiB", describe(config))
    assert float(found) == pytest.approx(total / 2**20, abs=0.1)


def test_nothing_is_allocated() -> None:
    pipeline = pipeline_on_meta(TeacherSource("training/architectures/wan2_2_i2v_a14b"))
    for part in (pipeline.transformer, pipeline.transformer_2, pipeline.vae):
        assert {p.device.type for p in part.parameters()} == {"meta"}


def test_what_cannot_be_described_is_one_line(settings_of_run: dict[str, Any], tmp_path: Path) -> None:
    def refused(error: type[Exception], words: str, **model: Any) -> None:
        config = parse_config(settings_of_run | {"model": settings_of_run["model"] | model}, "test")
        with pytest.raises(error, match=words) as caught:
            describe(config)
        assert len(str(caught.value).splitlines()) == 1

    refused(ConfigError, "frames, found 3", frames=3)
    refused(TeacherError, "neither a folder", path="nowhere")
    refused(TeacherError, "'NoPipeline' is not a pipeline class", pipeline="NoPipeline")
    refused(TeacherError, "cannot load a pipeline", architecture=str(tmp_path))
