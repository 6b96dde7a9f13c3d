"""Held is what weights, gradients and optimizer take; what grows with blocks is scaled to all of them."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from benchmarks.cost.random_training import RandomTeacher, released_teacher, small_config, small_teacher
from benchmarks.cost.training_memory import MODELS, SMALL, Peak, blocks_of, held_bytes, measure, scaled, table
from pdmd_core.families import family
from pdmd_core.roles import Roles
from training.config.schema import load_config

MB = 2**20
ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "training" / "configs"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_held_bytes_are_those_of_live_tensors_once_each() -> None:
    gc.collect()
    before = held_bytes("cpu")
    whole = torch.ones(3 * MB, dtype=torch.bfloat16)
    part = whole[:MB]
    assert held_bytes("cpu") - before == 6 * MB
    del whole, part
    assert held_bytes("cpu") == before


def test_the_peak_of_a_process_is_what_it_held_in_between() -> None:
    held = torch.ones(4 * MB)
    peak = Peak("cpu")
    torch.ones(50 * MB)  # and gone again
    found = peak.bytes(held.nbytes)
    assert found - held.nbytes == pytest.approx(4 * 50 * MB, rel=0.1)


def lora_numbers(teacher: RandomTeacher, phases: int) -> tuple[int, int]:
    """Adapter weights of the experts and of the fake."""
    config = small_config()
    roles = Roles(teacher.networks, teacher.family, config.role_specs(teacher.routing), teacher.routing)
    counts = {role: sum(p.numel() for p in roles.parameters(role)) for role in roles.specs}
    return sum(counts[role] for role in list(counts)[:phases]), counts["fake"]


@pytest.mark.parametrize("name", ["wan", "wan_two_networks"])
def test_held_is_base_adapters_moments_and_one_role_s_gradients(name: str) -> None:
    experts, fake = lora_numbers(small_teacher(name, "tiny", 4), 2)
    trained = experts // 2  # one of the two experts; the fake of two networks is twice as large
    config = small_config(fake_updates=1, batch_size=4, score_groups=4)  # on both networks in every step
    found = measure(config, small_teacher(name, "tiny", 4), Accelerator(cpu=True), "cpu")
    weights_and_moments = 4 * (experts + fake + 2 * (trained + fake))
    extra = (
        found["held"] - found["base"] - weights_and_moments - 4 * fake
    )  # gradients of the fake, the larger of the two
    assert found["base"] == sum(
        4 * p.numel() for n in small_teacher(name, "tiny", 4).networks.values() for p in n.parameters()
    )
    assert 0 <= extra < 0.3 * weights_and_moments, "besides: optimizers' step counters, samples"


def test_a_released_teacher_has_the_real_widths_and_the_asked_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {}
    for model in MODELS:
        config = load_config(CONFIGS / f"{model}_phased_single_gpu.yaml", SMALL)
        counted[model] = blocks_of(config)
    assert {model: blocks for model, (blocks, _) in counted.items()} == dict(zip(MODELS, (30, 40, 40, 60), strict=True))
    assert counted["qwen_image"][1] == pytest.approx(20.43e9, rel=1e-3)
    assert counted["wan2_2_t2v_a14b"][1] == counted["wan2_1_t2v_14b"][1], "one of its two networks at a time"
    both = load_config(
        CONFIGS / "wan2_2_t2v_a14b_phased_single_gpu.yaml", [*SMALL, "memory.offload_idle_network=false"]
    )
    assert blocks_of(both)[1] == 2 * counted["wan2_1_t2v_14b"][1]
    config = load_config(CONFIGS / "wan2_1_t2v_1_3b_phased_single_gpu.yaml", SMALL)
    teacher = released_teacher(config, 1, "cpu")
    (network,) = teacher.networks.values()
    assert len(network.blocks) == 1 and network.config.num_attention_heads * 128 == 1536
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16, torch.float32}
    assert network.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert network.scale_shift_table.dtype == torch.float32, "diffusers keeps it so"
    assert teacher.shape == (16, 1, 8, 8) and teacher.conditioning == {"prompt_embeds": (16, 4096)}


def test_what_is_held_beside_the_base_grows_with_the_blocks() -> None:
    row = {"base": 300, "held": 310, "peak": 400}
    assert scaled(row, whole_base=1000, blocks=40, built=4) == pytest.approx(1.1)
    shown = {**row, "recipe": "r", "built": 4, "blocks": 40, "whole_base": 2**30, "ratio": 1.1}
    assert table([shown]).splitlines()[-1] == "| r | 4 of 40 | 0.00 | 0.00 | 0.00 | 1.100 | 1.0 |"


def test_weights_of_random_networks_depend_on_the_seed_alone() -> None:
    one, same, two = (small_teacher("wan_two_networks", "tiny", 4).networks for _ in range(3))
    for a, b in zip(one["transformer"].parameters(), same["transformer"].parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one["transformer"].patch_embedding.weight, two["transformer_2"].patch_embedding.weight)
    assert family("wan").architecture == type(one["transformer"]).__name__
