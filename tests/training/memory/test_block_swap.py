"""Block swap: what is where when a block runs, and that no number changes, of the networks of every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pdmd_core.batch import PROMPT_MASK, Batch, Renoising
from pdmd_core.distillation import PhasedDistiller
from pdmd_core.families import TeacherRouting
from pdmd_core.method import Objective
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import Roles, RoleSpec
from tests.helpers.configs import changed
from tests.helpers.families.cases import BY_FAMILY, OF_FAMILIES
from tests.helpers.families.wan import wan_two_networks
from tests.helpers.tiny import randn, randomise
from training.config.schema import ConfigError
from training.loop.build import build_run, enable_gradient_checkpointing
from training.loop.trainer import Trainer
from training.memory.block_swap import BlockRing, swap_blocks
from training.memory.host_memory import HostCopy

PLAN = PhasePlan.from_steps([2, 2], shift=3.0)
NETWORKS = [next(iter(cases)) for family, cases in BY_FAMILY.items() if family not in ("chroma", "flux2")]  # as flux


@pytest.fixture(autouse=True)
def what_is_away_is_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are not in a place of the ring are NaN, so that any use of them would be seen."""

    def place(self: HostCopy, views: list[Tensor]) -> None:
        away = views is self.views
        for tensor, view in zip(self.tensors, views, strict=True):
            tensor.data = torch.full_like(view, float("nan")) if away else view

    made = HostCopy.__init__

    def copied(self: HostCopy, tensors: Any, flat: Tensor) -> None:
        made(self, tensors, flat)
        self.place(self.views)

    monkeypatch.setattr(HostCopy, "place", place)
    monkeypatch.setattr(HostCopy, "__init__", copied)


def several_blocks(network: Any) -> nn.Module:
    """A network like this one with at least four blocks."""
    torch.manual_seed(3)
    more = {key: 3 for key in ("num_layers", "num_single_layers", "n_layers") if key in network.config}
    return type(network).from_config({**network.config, **more}).eval()


def gradients(name: str, swapped: int) -> dict[str, Tensor]:
    """Of both losses for the weights of fake and expert."""
    case = OF_FAMILIES[name]
    family, pipeline = case.family, case.build()
    assert family is not None
    network = several_blocks(pipeline.transformer)
    latent = family.latent_shape(pipeline, *case.size)
    spec = RoleSpec("lora", 2, 2.0)
    torch.manual_seed(0)
    roles = Roles(network, family, {"high_noise": spec, "low_noise": spec, "fake": spec}, TeacherRouting())
    for seed, role in enumerate(roles.specs):
        randomise(roles, role, seed)
    if swapped:
        ring = swap_blocks(roles, swapped, torch.device("cpu"))
        assert len(ring.home) == min(swapped, len(family.blocks_of(network))) > 2
    roles.set_trainable(["high_noise", "fake"])
    enable_gradient_checkpointing(network)
    shapes = family.conditioning_shapes(network.config, case.tokens, latent)
    conditioning = {key: randn(2, *shape, seed=k) for k, (key, shape) in enumerate(shapes.items())}
    if PROMPT_MASK in shapes:
        conditioning[PROMPT_MASK] = torch.ones(2, *shapes[PROMPT_MASK], dtype=torch.bool)
    batch = Batch(randn(2, *latent, seed=9), conditioning, conditioning)
    distiller = PhasedDistiller(PLAN, 0, roles, Objective(guidance_scale=2.0))
    renoising = Renoising(torch.tensor([0.8, 0.9]), randn(2, *latent, seed=8))
    x_s = distiller.fake_rollout(batch, 1)
    distiller.fake_loss(x_s, conditioning, renoising).backward()
    loss = distiller.generator_loss(distiller.expert_rollout(batch, 1), batch, renoising).loss
    roles.activate("high_noise")
    loss.backward()
    return {
        f"{role}.{path}": parameter.grad
        for role in ("high_noise", "fake")
        for path, parameter in roles.named_parameters(role).items()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_without_swapping(name: str) -> None:
    """Bit for bit, with all blocks swapped: every block is found again in the backward pass."""
    expected, found = gradients(name, 0), gradients(name, 100)
    assert set(found) == set(expected) and any(bool(value.any()) for value in expected.values())
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_the_next_block_comes_while_one_runs_and_nothing_twice() -> None:
    """Forwards, backwards, and forwards again; with gradient the last block is kept for the backward pass."""
    blocks = [[[torch.full((3,), float(10 * k + i))] for i in range(4)] for k in range(2)]
    wanted = [tensors[0].clone() for network in blocks for tensors in network]
    ring, copies = BlockRing(blocks, torch.device("cpu")), []
    bring = ring._bring

    def counted(index: int, other_than: int | None) -> int:
        if index not in ring.held:
            copies.append(index)
        return bring(index, other_than)

    ring._bring = counted  # type: ignore[method-assign]

    def run(*order: int, ahead: int | None) -> list[int]:
        copies.clear()
        for index in order:
            ring.use(index)
            assert torch.equal(ring.home[index].tensors[0], wanted[index])
        assert ring.held[1 - ring.held.index(order[-1])] == ahead
        return list(copies)

    with torch.no_grad():
        assert run(0, 1, 2, 3, ahead=0) == [0, 1, 2, 3, 0], "the next evaluation begins at the first block"
    assert run(0, 1, 2, 3, ahead=2) == [1, 2, 3], "with gradient block 2 is kept"
    assert run(3, 2, 1, 0, ahead=1) == [1, 0], "again, backwards"
    assert run(0, 1, ahead=2) == [2]
    assert run(4, 5, 6, 7, ahead=6) == [4, 5, 6, 7], "the other network"


def test_a_run_on_two_networks_has_the_numbers_of_one_without_swapping(
    settings_of_run: dict[str, Any], tmp_path: Path
) -> None:
    wan_two_networks().save_pretrained(tmp_path / "two")
    settings_of_run["model"] |= {"path": str(tmp_path / "two")}
    settings_of_run |= {"plan": {"steps": [1, 1], "shift": 5.0}, "updates": 1}
    whole = changed(settings_of_run, **{"memory.gradient_checkpointing": True})
    swapped = changed(whole, output_dir=str(tmp_path / "swapped"), **{"memory.swap_blocks": 9})
    rows = []
    for config in (whole, swapped):
        Trainer(build_run(config)).run()
        text = (config.output_dir / "metrics.jsonl").read_text(encoding="utf-8")
        keys = ("generator_loss", "fake_loss", "generator_grad_norm", "fake_grad_norm")
        rows.append([[json.loads(line)[key] for key in keys] for line in text.splitlines()])
    assert rows[0] == rows[1] and len(rows[0]) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel.sharding": "fsdp"}, "memory.swap_blocks keeps blocks whole: set parallel.sharding to none"),
        ({"memory.gradient_checkpointing": False}, "swap_blocks: weights go before the backward pass, with"),
        ({"memory.offload_idle_network": True}, "leave memory.offload_idle_network out"),
        ({"model.quantization": "int8"}, "memory.swap_blocks is for plain weights: set model.quantization to none"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    settings_of_run: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    settings = {"memory.gradient_checkpointing": True, "memory.swap_blocks": 2} | changes
    with pytest.raises(ConfigError, match=words) as error:
        changed(settings_of_run, **settings)
    assert "\n" not in str(error.value)
