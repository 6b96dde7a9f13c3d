"""Runs whose teacher is distilled: the experts of a folder, each at the sigmas of its interval."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pdmd_core.experts import PhasedExperts
from pdmd_core.experts.format.manifest import MANIFEST_NAME
from pdmd_core.experts.verify import SampleRequest, verify
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import TEACHER, Roles
from pdmd_core.rollout import route, sample
from pdmd_core.velocities import expert_velocities
from tests.helpers.configs import changed
from tests.helpers.families.wan import wan_two_networks
from tests.helpers.tiny_experts import save_experts
from training.config.command_line import UserError
from training.config.schema import DistillConfig
from training.data.teacher import TeacherSource, family_of_pipeline, load_image_side, networks_of
from training.loop.build import BuiltRun, build_run
from training.loop.dry_run import describe
from training.loop.export import roles_from_experts
from training.loop.resumption import Resume
from training.loop.teacher_samples import teacher_samples
from training.loop.trainer import Trainer
from training.loop.validation import starting_points

OF_TEACHER = PhasePlan.from_sigmas([[1.0, 0.9], [0.7, 0.4], [0.2]], ["high", "middle", "low"])


@pytest.fixture
def folder(teacher: Path, tmp_path: Path) -> Path:
    return save_experts(tmp_path / "teaches", teacher, (16, 16, 1), ("transformer",) * 3, OF_TEACHER)


@pytest.fixture
def taught(config: DistillConfig, folder: Path) -> DistillConfig:
    """Phases that begin in the first and in the second interval of the teacher."""
    plan = {"sigmas": [[1.0], [0.6]]}
    return changed(config, plan=plan, updates=1, **{"model.path": str(folder), "objective.guidance_scale": 1})


def loaded(run: BuiltRun, folder: Path) -> Roles:
    """The experts of the folder alone."""
    pipeline = load_image_side(TeacherSource(run.config.model.path), torch.float32)
    family = family_of_pipeline(pipeline)
    routing = family.teacher_routing(pipeline.config)
    return roles_from_experts(PhasedExperts.open(folder), networks_of(pipeline, family), family, routing)


def added(roles: Roles, name: str) -> dict[str, torch.Tensor]:
    """What a LoRA role adds to each module."""
    state, spec = roles.state_dict(name), roles.specs[name]
    modules = [key.removesuffix(".lora_A") for key in state if key.endswith(".lora_A")]
    return {m: spec.alpha / spec.rank * (state[f"{m}.lora_B"] @ state[f"{m}.lora_A"]) for m in modules}


def test_each_expert_teaches_in_its_interval_and_a_run_begins_as_them(
    taught: DistillConfig, folder: Path, teacher: Path
) -> None:
    run = build_run(taught)
    assert (run.config.model.path, run.config.model.experts) == (str(teacher), folder)
    alone = loaded(run, folder)
    indices, noise = starting_points(run, run.data.validation)
    sigmas = torch.tensor([1.0, 0.95, 0.7, 0.3, 0.2, 0.05])[: len(noise)]
    conditioning = run.data.validation.conditioning(indices, torch.device("cpu"))
    velocity = run.roles.velocity(TEACHER, noise, sigmas, conditioning)
    assert len(sigmas) > 4
    for i, owner in enumerate(("high", "high", "middle", "middle", "low", "low")[: len(noise)]):
        row = {name: value[i : i + 1] for name, value in conditioning.items()}
        own = alone.velocity(owner, noise[i : i + 1], sigmas[i : i + 1], row)
        torch.testing.assert_close(velocity[i : i + 1], own, atol=1e-5, rtol=1e-4)
    for name, owner in (("high_noise", "high"), ("low_noise", "middle")):
        for module, value in added(alone, owner).items():
            torch.testing.assert_close(added(run.roles, name)[module], value, atol=1e-6, rtol=1e-4)
    assert not any(value.any() for key, value in run.roles.state_dict("fake").items() if key.endswith("lora_B"))
    walked = sample(route(expert_velocities(alone, OF_TEACHER, conditioning), OF_TEACHER), OF_TEACHER.sigmas, noise)
    shown = teacher_samples(run, run.data.validation)
    torch.testing.assert_close(shown["low_noise"], walked, atol=1e-5, rtol=1e-4)


def test_a_run_goes_on_with_the_same_teacher_alone_and_names_it(taught: DistillConfig, folder: Path) -> None:
    trainer = Trainer(build_run(taught))
    before = {name: value.clone() for name, value in trainer.roles.state_dict("teacher_low").items()}
    experts = PhasedExperts.open(trainer.run())
    assert all(torch.equal(value, before[name]) for name, value in trainer.roles.state_dict("teacher_low").items())
    files = {f"teacher_{e.name}": {"sha256": e.sha256} for e in PhasedExperts.open(folder).manifest.experts}
    assert experts.manifest.training["teacher_experts"] == files
    assert experts.manifest.training["teacher_guidance_scale"] == 2, "that of the model which taught them"
    assert "start" not in experts.manifest.training
    assert experts.manifest.base.model == taught.model.path
    moved = shutil.copytree(folder, folder.with_name("moved"))
    assert build_run(changed(taught, **{"model.experts": str(moved)}), Resume()).resumption
    save_experts(moved, Path(taught.model.path), (16, 16, 1), ("transformer",) * 3, OF_TEACHER, seed=3)
    with pytest.raises(UserError, match=r"^model\.experts: .*moved is not what the run started from, so it cannot be "):
        build_run(changed(taught, **{"model.experts": str(moved)}), Resume())


def test_experts_on_two_networks_teach_experts_on_both(taught: DistillConfig, tmp_path: Path) -> None:
    """Four steps to two, on a base as Wan 2.2 A14B: the teacher's border is the base's, that of the run is another."""
    base, of_teacher = tmp_path / "two", PhasePlan.from_sigmas([[1.0, 0.9375], [0.8333, 0.625]], ["high", "low"])
    wan_two_networks().save_pretrained(base)
    both = ("transformer", "transformer_2")
    folder = save_experts(tmp_path / "experts", base, (16, 16, 1), both, of_teacher)
    config = changed(taught, plan={"sigmas": [[1.0], [0.8333]]}, **{"model.path": str(folder), "model.experts": None})
    trainer = Trainer(build_run(config))
    roles, alone = trainer.roles, loaded(trainer.built, folder)
    indices, noise = starting_points(trainer.built, trainer.built.data.validation)
    conditioning = trainer.built.data.validation.conditioning(indices, torch.device("cpu"))
    for sigma, owner in ((1.0, "high"), (0.85, "high"), (0.8, "low"), (0.1, "low")):
        found = roles.velocity(TEACHER, noise, sigma, conditioning)
        torch.testing.assert_close(found, alone.velocity(owner, noise, sigma, conditioning), atol=1e-5, rtol=1e-4)
    before = {
        name: {k: v.clone() for k, v in roles.state_dict(name).items()} for name in ("teacher_high", "high_noise")
    }
    experts = PhasedExperts.open(trainer.run())
    assert [expert.component for expert in experts.manifest.experts] == list(both)
    assert all(torch.equal(value, before["teacher_high"][k]) for k, value in roles.state_dict("teacher_high").items())
    assert any(not torch.equal(value, before["high_noise"][k]) for k, value in roles.state_dict("high_noise").items())
    assert experts.manifest.base.model == str(base) and trainer.progress.bad == 0
    checks = list(verify(experts.folder, str(base), SampleRequest()))
    assert checks[-1].name == "sample" and all(check.passed for check in checks), "as stock diffusers samples"


def test_a_dry_run_says_who_teaches(taught: DistillConfig, folder: Path) -> None:
    text = describe(taught)
    assert f"is the base of the experts of {folder}, which teach" in text
    assert "teacher_middle" in text


def test_what_cannot_teach_is_said_in_a_line(
    taught: DistillConfig, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        UserError, match=r"^objective\.guidance_scale: .* sample with 1 \(none\), found 2: set it to that$"
    ):
        build_run(changed(taught, **{"objective.guidance_scale": 2}))
    for run in (build_run, describe):  # shards of one expert: tests/training/distributed/test_processes.py
        with pytest.raises(
            UserError, match=r"of the 3 experts of .* weights stay whole: set parallel\.sharding to none"
        ):
            run(changed(taught, **{"parallel.sharding": "fsdp"}))
    with pytest.raises(UserError, match="names: expected names of experts, found 'teacher_low'"):
        changed(taught, plan={"steps": [1, 1], "names": ["high_noise", "teacher_low"]})
    with pytest.raises(UserError, match="expected the pipeline of the base beside experts, found other experts"):
        changed(taught, **{"model.path": str(folder)})
    manifest = json.loads((folder / MANIFEST_NAME).read_text("utf-8"))
    for values, line in (
        ({"architecture": "FluxTransformer2DModel", "family": "flux"}, "stand on a Flux.*, found a Wan"),
        ({"architecture": "WanTransformer3DModel"}, "stand on a Wan.* with transformer_2, found no transformer_2"),
    ):
        manifest["base"] |= values
        if "family" not in values:
            manifest["base"]["family"] = "wan"
            manifest["experts"][0]["component"] = "transformer_2"
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest), "utf-8")
        with pytest.raises(UserError, match=rf"^model\.experts: .*{line}.*: give model\.path their base"):
            build_run(taught)
    (folder / MANIFEST_NAME).write_text("{", "utf-8")
    with pytest.raises(UserError, match=r"model\.path: .*phased_experts\.json"):
        changed(taught, model={"path": str(folder)})
