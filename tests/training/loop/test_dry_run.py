"""Every recipe is described from configs alone: nothing is downloaded, nothing is allocated."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks.cost.recipe_costs import KINDS, gpus_of, row
from benchmarks.cost.recipe_costs import MODELS as RECIPE_MODELS
from pdmd_core.families import TeacherRouting, family
from pdmd_core.roles import FAKE, Roles
from tests.helpers.configs import changed
from tests.helpers.families.wan import wan_two_networks
from training.config.command_line import UserError
from training.config.schema import ConfigError, load_config, parse_config
from training.data.teacher import (
    TeacherError,
    TeacherSource,
    family_of_pipeline,
    load_image_side,
    networks_of,
    pipeline_on_meta,
)
from training.loop.build import build_run
from training.loop.dry_run import describe
from training.loop.trainer import Trainer
from training.memory.offload import OneOnDevice
from training.memory.static import static_memory

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "training" / "configs"
MODELS = {
    "wan2_1_t2v_14b": ("14.29 G parameters", "16x21x60x104", 5.0),
    "wan2_1_t2v_1_3b": ("1.42 G parameters", "16x21x60x104", 5.0),
    "wan2_2_t2v_a14b": ("28.58 G parameters", "16x21x60x104", 5.0),
    "wan2_2_i2v_a14b": ("28.58 G parameters", "16x21x60x104", 5.0),
    "wan2_2_ti2v_5b": ("5.00 G parameters", "48x31x44x80", 5.0),
    "wan2_2_ti2v_5b_image": ("5.00 G parameters", "48x31x44x80", 5.0),
    "wan2_1_i2v_14b_480p": ("16.39 G parameters", "16x21x60x104", 5.0),
    "wan2_1_flf2v_14b_720p": ("16.40 G parameters", "16x21x60x104", 5.0),
    "ltx_video": ("1.92 G parameters", "128x21x15x22", 5.0),
    "qwen_image": ("20.43 G parameters", "16x1x166x166", 3.0),
    "qwen_image_edit": ("20.43 G parameters", "16x1x128x128", 3.0),
    "qwen_image_edit_plus": ("20.43 G parameters", "16x1x128x128", 3.0),
    "z_image": ("6.15 G parameters", "16x128x128", 3.0),
    "flux_1_dev": ("11.90 G parameters", "16x128x128", 3.16),
    "flux_1_kontext_dev": ("11.90 G parameters", "16x128x128", 3.16),
    "stable_diffusion_3_5_medium": ("2.24 G parameters", "16x128x128", 3.0),
    "stable_diffusion_3_5_large": ("8.06 G parameters", "16x128x128", 3.0),
    "chroma1_hd": ("8.90 G parameters", "16x128x128", 3.0),
    "flux_2_dev": ("32.22 G parameters", "128x64x64", 3.0),
    "flux_2_klein_base_9b": ("9.08 G parameters", "128x64x64", 3.0),
    "hunyuan_video_1_5_480p": ("8.33 G parameters", "32x31x30x53", 5.0),
    "hunyuan_video_1_5_480p_image": ("8.33 G parameters", "32x31x30x53", 5.0),
    "ltx_2": ("18.88 G parameters", "131x16x16x24", 5.0),
    "ltx_2_image": ("18.88 G parameters", "131x16x16x24", 5.0),
}
"""Parameters of the teacher, latents of a sample, shift of the plan."""
OF_THE_PAPER = ("wan2_1_t2v_14b", "wan2_1_t2v_1_3b", "wan2_2_t2v_a14b", "wan2_2_i2v_a14b", "qwen_image")
"""Models of the paper, which have its setting and its baseline as recipes too."""
SMALL = {"phased_24gb": 24, "phased_48gb": 48}
"""Recipes that swap blocks, and the memory of their GPU in GiB."""
SWAPPED = ("wan2_2_t2v_a14b", "qwen_image")
_ONLY = dict.fromkeys(SMALL, SWAPPED) | dict.fromkeys(("phased_paper", "dmd_sgts"), OF_THE_PAPER)
RECIPES = [(name, kind) for name in MODELS for kind in KINDS if name in _ONLY.get(kind, MODELS)]
COSTS = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").splitlines()


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def check_that_little_is_held_beside_the_teacher(text: str, two_networks: bool) -> None:
    """At most 1.15 times what it takes; the parts add up to the whole, and the whole has that ratio."""
    (found,) = re.findall(
        r"^  ratio +([\d.]+): .* teacher on the GPU(?:, ([\d.]+) of both its networks)?", text, re.MULTILINE
    )
    ratio = float(found[0])
    assert 1 < ratio <= 1.15
    assert bool(found[1]) == two_networks
    if two_networks:
        assert float(found[1]) == pytest.approx(ratio / 2, abs=0.001)
    sizes = re.findall(r"^  (\w+) +([\d.]+) ([GM])iB:", text, re.MULTILINE)
    parts = {role: float(size) / (1 if unit == "G" else 1024) for role, size, unit in sizes}
    total, activations = parts.pop("all"), parts.pop("activations")
    assert parts.pop("peak") == pytest.approx(total + activations, abs=0.02)
    assert sum(parts.values()) == pytest.approx(total, abs=0.03)
    assert total / parts["teacher"] == pytest.approx(ratio, abs=0.01)


def test_recipes_are_those_of_the_tests() -> None:
    named = {f"{model}_{recipe}" for model, recipe in RECIPES}
    assert named == {path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("embedded")}
    assert set(RECIPE_MODELS) == set(MODELS)


@pytest.mark.parametrize(("model", "recipe"), RECIPES)
def test_every_recipe_says_what_it_takes(model: str, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library of 8-bit moments, which a dry run does not need."""
    for name in ("torchao", "torchao.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    # tests/training/memory/test_activations.py counts them, in seconds for each recipe
    monkeypatch.setattr("training.loop.dry_run.activation_bytes", lambda *_: 2**30)
    config = load_config(CONFIGS / f"{model}_{recipe}.yaml")
    single, small = recipe == "phased_single_gpu", recipe in SMALL
    gpus = gpus_of(model, recipe)
    text = describe(config, memory_per_gpu=SMALL.get(recipe, 80), gpus=gpus)
    assert row(f"{model}_{recipe}", config, gpus, text) in COSTS, "python benchmarks/cost/recipe_costs.py"
    parameters, latents, _ = MODELS[model]
    assert parameters in text and f"latents {latents}" in text
    ((host, when),) = re.findall(r"^  host memory +([\d.]+ [GM]iB): the teacher, in each process, (.*)$", text, re.M)
    if single or small:
        assert float(host.removesuffix(" GiB")) * 2**30 == pytest.approx(2e9 * float(parameters.split()[0]), rel=0.01)
        stays = "all the time" if "a14b" in model else "until it is on the GPU"
        assert when == ("what is swapped of it all the time" if small else stays)
    else:
        assert host.endswith("MiB") and when == "its shard of one weight after the other"
    assert ("transformer_2 below" in text) == ("a14b" in model)
    assert ("one network at a time" in text) == (single and "a14b" in model)
    phases = text.count("network evaluations of each sample")
    assert phases == len(config.plan.build()) == (1 if recipe == "dmd_sgts" else 2)
    assert (config.parallel.sharding == "fsdp") == (not single and not small)
    assert text.count("block swap: ") == (2 if small else 0)
    if single:
        check_that_little_is_held_beside_the_teacher(text, "a14b" in model)
    if recipe == "phased" and model in ("wan2_1_t2v_14b", "qwen_image"):
        with pytest.raises(UserError, match=r"does not fit: .* GiB .*80 GiB given; the largest is fake") as caught:
            describe(config, memory_per_gpu=80, advise=False)
        assert len(str(caught.value).splitlines()) == 1


def role_bytes(text: str) -> dict[str, float]:
    """MiB by role."""
    found = re.findall(r"^  (\w+) +([\d.]+) MiB:", text, re.MULTILINE)
    return {name: float(size) for name, size in found if name not in ("activations", "peak")}


def test_shards_divide_the_base_and_full_copies_and_nothing_else(
    settings_of_run: dict[str, Any], tmp_path: Path
) -> None:
    wan_two_networks().save_pretrained(tmp_path / "two")
    settings_of_run["model"] |= {"path": str(tmp_path / "two")}
    settings_of_run |= {"plan": {"steps": [2, 2], "shift": 5.0}, "fake": {"kind": "full"}, "batch_size": 8}

    def on(gpus: int, **changes: Any) -> dict[str, float]:
        return role_bytes(describe(changed(settings_of_run, **changes), gpus=gpus))

    alone = on(1)
    each = on(1, **{"objective.fake_rollouts": "per_step"})
    assert each["fake"] == each["fake_2"] == alone["fake"] and each["gradients"] == alone["gradients"]
    assert on(8) == alone, "without sharding every GPU holds everything"
    for gpus, shards, changes in (
        (8, 8, {"parallel.sharding": "fsdp"}),
        (8, 4, {"parallel.sharding": "hsdp", "parallel.shard_size": 4}),
        (4, 4, {"parallel.sharding": "fsdp"}),
    ):
        found = on(gpus, **changes)
        for role in ("teacher", FAKE):
            assert found[role] == pytest.approx(alone[role] / shards, abs=0.06)
        for role in ("high_noise", "low_noise"):
            assert found[role] == alone[role]
        assert found["gathered"] > 0 and "gathered" not in alone
        assert found["all"] == pytest.approx(sum(v for role, v in found.items() if role != "all"), abs=0.2)
    with pytest.raises(ConfigError, match="8 samples cannot be divided among 3"):
        on(3)


def test_regression_holds_and_asks_no_fake_and_says_which_keys_have_no_use(settings_of_run: dict[str, Any]) -> None:
    settings_of_run |= {"plan": {"steps": [2, 2], "shift": 5.0}, "fake": {"kind": "full"}}
    text = describe(changed(settings_of_run, **{"objective.expert_loss": "regression"}))
    assert FAKE not in role_bytes(text)
    for rollout in ("0.5", "2.5"):
        assert f"of each sample (rollout {rollout}, generator 1, teacher 4" in text
    assert "\nnot used with objective.expert_loss regression: fake" in text
    matching = describe(changed(settings_of_run, **{"objective.path_steps": 8}))
    assert "\nnot used with objective.expert_loss matching: objective.path_steps\n" in matching


def test_one_network_at_a_time_takes_the_memory_of_one(settings_of_run: dict[str, Any], tmp_path: Path) -> None:
    wan_two_networks().save_pretrained(tmp_path / "two")
    settings_of_run["model"] |= {"path": str(tmp_path / "two")}
    settings_of_run |= {"plan": {"steps": [2, 2], "shift": 5.0}, "memory": {"gradient_checkpointing": True}}
    both, one = (
        role_bytes(describe(changed(settings_of_run, **{"memory.offload_idle_network": idle})))
        for idle in (False, True)
    )
    assert one["teacher"] == pytest.approx(both["teacher"] / 2, abs=0.06)
    assert {role: one[role] for role in ("high_noise", FAKE)} == {role: both[role] for role in ("high_noise", FAKE)}


@pytest.mark.parametrize("model", MODELS)
def test_recipes_have_the_paper_s_settings_but_for_rollouts(model: str) -> None:
    own, paper = ("whole", "own_increment"), ("blend", "truncated")
    rollouts = {"phased": own, "phased_paper": paper, "dmd_sgts": paper}
    for recipe in rollouts if model in OF_THE_PAPER else ("phased",):
        config = load_config(CONFIGS / f"{model}_{recipe}.yaml")
        assert (config.objective.fake_rollouts, config.objective.expert_rollouts) == rollouts[recipe]
        generator, fake = config.generator, config.fake
        assert (generator.kind, generator.rank, generator.alpha, generator.lr) == ("lora", 64, 8, 5e-5)
        assert (fake.kind, fake.lr, config.fake_updates * config.draws_per_rollout) == ("full", 4e-7, 5)
        assert config.draws_per_rollout == (5 if recipe == "phased" else 1)
        assert generator.betas == fake.betas == (0, 0.999) and generator.weight_decay == fake.weight_decay == 0.01
        assert generator.max_grad_norm == fake.max_grad_norm == 1
        shift = MODELS[model][2]
        sigmas = [shift * t / (1 + (shift - 1) * t) for t in (1, 0.75, 0.5, 0.25)]
        assert config.plan.build().sigmas == pytest.approx(sigmas)


@pytest.mark.parametrize(
    ("model", "weights", "kind", "boundary"),
    [
        ("wan2_1_t2v_14b", 14_288_491_584, "WanPipeline", None),
        ("wan2_1_t2v_1_3b", 1_418_996_800, "WanPipeline", None),
        ("wan2_2_t2v_a14b", 14_288_491_584, "WanPipeline", 0.875),
        ("wan2_2_i2v_a14b", 14_288_491_584 + 20 * 4 * 5120, "WanImageToVideoPipeline", 0.9),  # mask and image
        ("wan2_2_ti2v_5b", 4_999_787_712, "WanPipeline", None),
        ("wan2_1_i2v_14b_480p", 16_394_878_784, "WanImageToVideoPipeline", None),
        ("wan2_1_flf2v_14b_720p", 16_394_878_784 + 514 * 1280, "WanImageToVideoPipeline", None),  # places of two images
        ("ltx_video", 1_923_385_472, "LTXPipeline", None),
        ("qwen_image", 20_430_401_088, "QwenImagePipeline", None),
        ("qwen_image_edit", 20_430_401_088, "QwenImageEditPipeline", None),
        ("qwen_image_edit_plus", 20_430_401_088, "QwenImageEditPlusPipeline", None),
        ("z_image", 6_154_908_736, "ZImagePipeline", None),
        ("flux_1_dev", 11_901_408_320, "FluxPipeline", None),
        ("flux_1_kontext_dev", 11_901_408_320, "FluxKontextPipeline", None),
        ("stable_diffusion_3_5_medium", 2_243_171_520, "StableDiffusion3Pipeline", None),
        ("stable_diffusion_3_5_large", 8_056_627_520, "StableDiffusion3Pipeline", None),
        ("chroma1_hd", 8_899_983_424, "ChromaPipeline", None),
        ("flux_2_dev", 32_223_281_152, "Flux2Pipeline", None),
        ("flux_2_klein_base_9b", 9_078_581_248, "Flux2KleinPipeline", None),
        ("hunyuan_video_1_5_480p", 8_326_608_160, "HunyuanVideo15Pipeline", None),
        ("hunyuan_video_1_5_480p_image", 8_326_608_160, "HunyuanVideo15ImageToVideoPipeline", None),
        ("ltx_2", 18_876_174_592, "LTX2Pipeline", None),
    ],
)
def test_architectures_are_those_of_the_released_models(
    model: str, weights: int, kind: str, boundary: float | None
) -> None:
    """weights: of each network, exactly, so that no size in its config can be another one."""
    pipeline = pipeline_on_meta(TeacherSource(f"training/architectures/{model}"))
    found = family_of_pipeline(pipeline)
    assert type(pipeline).__name__ == kind
    assert found.teacher_routing(pipeline.config).boundary == boundary
    networks = networks_of(pipeline, found)
    assert list(networks) == ["transformer", "transformer_2"][: 1 if boundary is None else 2]
    assert {sum(p.numel() for p in network.parameters()) for network in networks.values()} == {weights}


def alive(trainer: Trainer) -> tuple[int, set[str]]:
    """Bytes of the teacher and of what roles hold, but for adapters that are away; the roles that have gradients."""
    roles, idle = trainer.roles, trainer.roles.before_role
    networks = [roles.base_state_dict(name).values() for name in roles.bases]
    tensors = [value for network in networks for value in network]
    with_gradients = set()
    for role in roles.specs:
        parameters = roles.parameters(role)
        if not (isinstance(idle, OneOnDevice) and role in idle.kept and role != idle.here):
            tensors += parameters
        if gradients := [p.grad for p in parameters if p.grad is not None]:
            tensors += gradients
            with_gradients.add(role)
    for optimizer in trainer.training.optimizers.values():
        tensors += [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    if trainer.training.average is not None:
        tensors += trainer.training.average.shadow_params
    return sum(t.numel() * t.element_size() for t in tensors), with_gradients


@pytest.mark.parametrize(
    "changes", [{}, {"memory.offload_idle_experts": True}, {"memory.micro_batch_size": 1}, {"ema_decay": 0.9}]
)
def test_bytes_are_the_most_that_a_run_holds(
    settings_of_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Counted on a tiny teacher of two networks at every optimizer step and whenever an idle expert comes."""
    wan_two_networks().save_pretrained(tmp_path / "two")
    settings_of_run["model"] |= {"path": str(tmp_path / "two")}
    role = {"kind": "lora", "rank": 256, "alpha": 4, "lr": 1e-2}  # so that adapters are most of it
    settings_of_run |= {"plan": {"steps": [1, 1], "shift": 5.0}, "generator": role, "fake": role, "ema_decay": None}
    settings_of_run |= {"batch_size": 2, "score_groups": 2, "updates": 2, "fake_updates": 4}
    if changes.get("memory.micro_batch_size"):
        # gradients of a part are there when an expert comes for the next; together more than those of a small fake
        changes = {**changes, "memory.offload_idle_experts": True, "fake": {**role, "rank": 64}}
    config = changed(settings_of_run, **changes)
    trainer = Trainer(build_run(config))
    found: list[int] = []

    def at_a_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        size, with_gradients = alive(trainer)
        (stepping,) = [role for role, own in trainer.training.optimizers.items() if own is optimizer]
        assert with_gradients == {stepping}, "gradients of the other role are gone"
        found.append(size)

    bring = OneOnDevice._bring

    def when_one_comes(self: OneOnDevice, role: str) -> None:
        bring(self, role)
        self.here = role
        found.append(alive(trainer)[0])

    monkeypatch.setattr(OneOnDevice, "_bring", when_one_comes)
    hook = register_optimizer_step_pre_hook(at_a_step)
    try:
        trainer.run()
    finally:
        hook.remove()
    (shown,) = re.findall(r"all +([\d.]+) MiB", describe(config))
    assert float(shown) == pytest.approx(max(found) / 2**20, abs=0.06), "shown with one decimal"


def test_weights_that_diffusers_keeps_in_float32_are_counted_so(settings_of_run: dict[str, Any]) -> None:
    settings_of_run["model"] |= {"dtype": "bfloat16"}
    config = parse_config(settings_of_run, "test")
    source = TeacherSource(config.model.path)
    loaded = list(load_image_side(source, torch.bfloat16).transformer.parameters())
    sizes = {dtype: sum(p.nbytes for p in loaded if p.dtype == dtype) for dtype in (torch.float32, torch.bfloat16)}
    networks, routing = networks_of(pipeline_on_meta(source), family("wan")), TeacherRouting()
    roles = Roles(networks, family("wan"), config.role_specs(routing), routing)
    assert static_memory(config, config.plan.build(), roles, 1).base == sum(sizes.values())
    assert all(sizes.values())


def test_nothing_is_allocated() -> None:
    pipeline = pipeline_on_meta(TeacherSource("training/architectures/wan2_2_i2v_a14b"))
    for part in (pipeline.transformer, pipeline.transformer_2, pipeline.vae):
        assert {p.device.type for p in part.parameters()} == {"meta"}


def test_what_cannot_be_described_is_one_line(settings_of_run: dict[str, Any], tmp_path: Path) -> None:
    def refused(error: type[Exception], words: str, **model: Any) -> None:
        config = changed(settings_of_run, model=settings_of_run["model"] | model)
        with pytest.raises(error, match=words) as caught:
            describe(config)
        assert len(str(caught.value).splitlines()) == 1

    refused(ConfigError, "frames, found 3", frames=3)
    refused(TeacherError, "neither a folder", path="nowhere")
    refused(TeacherError, "'NoPipeline' is not a pipeline class", pipeline="NoPipeline")
    refused(TeacherError, "cannot be loaded as a pipeline", architecture=str(tmp_path))


def test_targets_that_match_nothing_are_one_line_in_a_dry_run_and_in_a_run(settings_of_run: dict[str, Any]) -> None:
    for section in ("generator", "fake"):
        config = changed(settings_of_run, **{f"{section}.targets": ["to_q", "to_w"]})
        for run in (describe, build_run):
            with pytest.raises(ConfigError, match=rf"^{section}\.targets: no module .* ends in 'to_w'; .*attn1\.to_q"):
                run(config)
