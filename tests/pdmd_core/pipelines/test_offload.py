"""Offloading, on one device: which network is loaded when, and that nothing gets another's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from torch import nn

from pdmd_core.experts import ExpertsError
from pdmd_core.phases import PhasePlan
from pdmd_core.pipelines import attach_experts, detach_experts
from tests.helpers.families.cases import CASES
from tests.helpers.tiny_pipelines import KINDS, PLAN, THREE, full_experts, lora_experts

CPU = torch.device("cpu")


@pytest.fixture(params=["lora", "full"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[nn.Module, nn.Module | None]]:
    """What model offloading does, in order: the module that is loaded, and the one that leaves for it."""
    seen: list[tuple[nn.Module, nn.Module | None]] = []
    load = accelerate.hooks.CpuOffload.pre_forward

    def on(hook: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append((module, hook.prev_module_hook.model if hook.prev_module_hook else None))
        return load(hook, module, *args, **kwargs)

    monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", on)
    return seen


@pytest.mark.parametrize("attached", ["before", "after"])
@pytest.mark.parametrize(("name", "plan"), [("wan", PLAN), ("flux", THREE)])
def test_model_offload_loads_only_the_expert_on_turn(
    name: str, plan: PhasePlan, attached: str, tmp_path: Path, loads: list[tuple[nn.Module, nn.Module | None]]
) -> None:
    case = CASES[name]
    plain = case.build()
    expected = case.sample(attach_experts(plain, full_experts(tmp_path, plain, plan)))
    pipe = case.build()
    if attached == "after":
        pipe.enable_model_cpu_offload(device="cpu")
    attach_experts(pipe, tmp_path)
    if attached == "before":
        pipe.enable_model_cpu_offload(device="cpu")
    networks = list(pipe.phased.networks)
    steps = [k for k, phase in enumerate(plan.phases) for _ in phase.sigmas]
    for _ in range(2):
        loads.clear()
        assert torch.equal(case.sample(pipe), expected)
        order = [(networks.index(m), left) for m, left in loads if any(m is network for network in networks)]
        assert [k for k, _ in order] == steps
        assert all(left is (networks[k - 1] if k else order[0][1]) for k, left in order)
        assert order[0][1] not in networks
    detach_experts(pipe)
    loads.clear()
    case.sample(pipe, num_inference_steps=4, **case.unguided)
    used = [module for module, _ in loads]
    assert any(m is pipe.transformer for m in used) and not any(m is n for m in used for n in networks)


@pytest.mark.parametrize("name", ["wan", "wan_two"])
def test_model_offload_with_lora_experts(name: str, tmp_path: Path, loads: list[Any]) -> None:
    case = CASES[name]
    pipe = case.build()
    components = ["transformer", "transformer_2"] if name == "wan_two" else None
    attach_experts(pipe, lora_experts(tmp_path, pipe, PLAN, components))
    expected = case.sample(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        loads.clear()
        assert torch.equal(case.sample(pipe), expected)
    networks = [pipe.transformer] if name == "wan" else [pipe.transformer, pipe.transformer_2]
    used = [module for module, _ in loads if any(module is network for network in networks)]
    assert len(used) == 4 and used[0] is networks[0] and used[-1] is networks[-1]


def test_sequential_offload(kind: str, tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = case.build()
    attach_experts(pipe, KINDS[kind](tmp_path, pipe, PLAN))
    expected = case.sample(pipe)
    for network in pipe.phased.networks or [pipe.transformer]:  # the text encoder here cannot be, whatever the pipeline
        accelerate.cpu_offload(network, CPU)
    for _ in range(2):
        assert torch.equal(case.sample(pipe), expected)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("name", ["wan", "wan_two", "flux"])
def test_group_offload(
    name: str, kind: str, offload_type: str, on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only groups of the expert on turn are loaded; on disk each component has a folder of its own."""
    case = CASES[name]
    pipe = case.build()
    components = {"components": ["transformer", "transformer_2"]} if (name, kind) == ("wan_two", "lora") else {}
    attach_experts(pipe, KINDS[kind](tmp_path / "experts", pipe, PLAN, **components))
    expected = case.sample(pipe)
    more: dict[str, Any] = {}
    if on_disk:  # diffusers loses the tied embeddings of T5 on disk, with experts or without
        encoders = ["text_encoder", "text_encoder_2"]
        more = {"offload_to_disk_path": str(tmp_path / "disk"), "exclude_modules": encoders}
    pipe.enable_group_offload(CPU, CPU, offload_type, num_blocks_per_group=1, **more)
    loaded: list[tuple[int, nn.Module]] = []
    onload = ModuleGroup.onload_

    def see(group: ModuleGroup) -> None:
        loaded.append((pipe.scheduler.phase, group.onload_leader))
        onload(group)

    monkeypatch.setattr(ModuleGroup, "onload_", see)
    for _ in range(2):
        loaded.clear()
        torch.testing.assert_close(case.sample(pipe), expected, rtol=0, atol=1e-5)
    networks = pipe.phased.networks or (pipe.transformer, getattr(pipe, "transformer_2", None) or pipe.transformer)
    for k, network in enumerate(networks):
        phases = {phase for phase, leader in loaded if any(leader is module for module in network.modules())}
        assert phases == ({0, 1} if networks[0] is networks[1] else {k})
    if on_disk:
        assert {path.name for path in (tmp_path / "disk").iterdir()} >= {"transformer", "vae"}


def test_group_offload_leaves_out_what_it_is_told(tmp_path: Path) -> None:
    for excluded in ("transformer_2", ["transformer_2", "vae"]):
        case = CASES["wan"]
        pipe = case.build()
        attach_experts(pipe, full_experts(tmp_path, pipe, PLAN))
        pipe.enable_group_offload(CPU, offload_type="leaf_level", exclude_modules=excluded)
        assert not any(hasattr(module, "_diffusers_hook") for module in pipe.transformer_2.modules())
        assert any(hasattr(module, "_diffusers_hook") for module in pipe.transformer.modules())
        assert any(hasattr(module, "_diffusers_hook") for module in pipe.vae.modules()) is (excluded == "transformer_2")


def test_two_experts_in_one_folder_on_disk_are_an_error(tmp_path: Path) -> None:
    """Each network's own enable_group_offload: the second would silently get the first one's weights."""
    case = CASES["wan"]
    pipe = case.build()
    attach_experts(pipe, full_experts(tmp_path / "experts", pipe, PLAN))
    for network in pipe.phased.networks:
        network.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "disk"))
    with pytest.raises(ExpertsError, match=r"transformer_2 and transformer are offloaded to the same folder, .*disk"):
        case.sample(pipe)


@pytest.mark.parametrize("how", ["sequential", "group"])
def test_full_experts_come_before_offloading_in_parts(how: str, tmp_path: Path) -> None:
    pipe = CASES["wan"].build()
    folder = full_experts(tmp_path, pipe, PLAN)
    if how == "group":
        pipe.enable_group_offload(CPU, offload_type="leaf_level")
    else:
        accelerate.cpu_offload(pipe.transformer, CPU)
    with pytest.raises(ExpertsError, match="is offloaded in parts: attach full experts first, then offload"):
        attach_experts(pipe, folder)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_lora_experts_may_come_after_group_offload(offload_type: str, tmp_path: Path) -> None:
    case = CASES["wan"]
    plain = case.build()
    expected = case.sample(attach_experts(plain, lora_experts(tmp_path, plain, PLAN)))
    pipe, call = case.build(), {"num_inference_steps": 4, **case.unguided}
    before = case.sample(pipe, **call)
    pipe.enable_group_offload(CPU, offload_type=offload_type, num_blocks_per_group=1)
    attach_experts(pipe, tmp_path)
    assert torch.equal(case.sample(pipe), expected)
    detach_experts(pipe)
    assert torch.equal(case.sample(pipe, **call), before)
