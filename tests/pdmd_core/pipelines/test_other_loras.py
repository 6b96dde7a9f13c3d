"""LoRA files for a network of no family here, AuraFlow, by its pipeline's own loader."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pdmd_core.experts import ExpertsError, PhasedExperts
from pdmd_core.phases import PhasePlan
from pdmd_core.pipelines import attach_experts, detach_experts
from tests.helpers.families.cases import CASES
from tests.helpers.lora_layouts import RANK, Deltas, added, deltas_of, pairs_of, save
from tests.helpers.tiny import randn
from tests.helpers.tiny_pipelines import euler

TWO = PhasePlan.from_steps([2])
AB = ("lora_A.weight", "lora_B.weight")


def diffusers_keys(name: str) -> tuple[dict[str, Tensor], Deltas]:
    """Pairs for attention, under diffusers' names, and what they mean at a scale of 1."""
    pairs = pairs_of(CASES[name].build().transformer, 1, ("to_q", "to_k", "to_v"))
    tensors = {
        f"transformer.{module}.{half}": value
        for module, both in pairs.items()
        for half, value in zip(AB, both, strict=True)
    }
    return tensors, deltas_of(pairs)


def check(name: str, path: Path, deltas: Deltas, caplog: pytest.LogCaptureFixture, strength: float = 1.0) -> list[str]:
    """Attach, sample, detach; returns the lines about keys without a place."""
    case = CASES[name]
    experts = PhasedExperts.from_lora_files(TWO, path, strength=strength)
    pipe = case.build()
    with caplog.at_level(logging.WARNING, "pdmd_core"):
        attach_experts(pipe, experts)
    expected = euler(case, TWO, [added(case.build().transformer, deltas, strength)])
    torch.testing.assert_close(case.sample(pipe), expected, rtol=1e-4, atol=1e-4)
    detach_experts(pipe)
    return [record.getMessage() for record in caplog.records if "no place" in record.getMessage()]


def test_alpha_beside_modules_or_in_the_metadata_and_strength(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = "aura_flow"
    tensors, deltas = diffusers_keys(name)
    quarter = {key: value / RANK for key, value in deltas.items()}
    in_metadata = save(tmp_path / "a.safetensors", tensors, lora_alpha="1")
    assert not check(name, in_metadata, quarter, caplog, strength=0.6)
    stems = {key.rpartition(".lora")[0] for key in tensors}
    beside = tensors | {f"{stem}.alpha": torch.tensor(1.0) for stem in stems}
    assert not check(name, save(tmp_path / "b.safetensors", beside), quarter, caplog)


def test_what_the_pipeline_s_loader_drops_is_applied_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors, deltas = diffusers_keys("aura_flow")
    network = CASES["aura_flow"].build().transformer
    bias = next(name for name, _ in network.named_parameters() if name.endswith("linear_1.bias"))
    change = randn(*network.get_parameter(bias).shape, seed=3)
    more = {
        f"transformer.{bias.removesuffix('.bias')}.diff_b": change,
        "transformer.nowhere.diff": torch.ones(3),
        "transformer.transformer_blocks.7.attn.to_q.lora_A.weight": torch.ones(RANK, 16),
        "transformer.transformer_blocks.7.attn.to_q.lora_B.weight": torch.ones(16, RANK),
        "lora_te1_x.alpha": torch.tensor(1.0),
        "note": torch.ones(1),
    }
    said = check("aura_flow", save(tmp_path / "x.safetensors", tensors | more), deltas | {bias: change}, caplog)
    assert len(said) == 1
    for key in ("note", "lora_te1_x.alpha", "transformer.nowhere.diff", "transformer_blocks.*.attn.to_q.lora_A.weight"):
        assert key in said[0]
    assert "5 of its keys" in said[0] and "diff_b" not in said[0]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"transformer.x.lora_A.weight": torch.ones(2, 3), "transformer.x.lora_B.weight": torch.ones(3, 2)},
            "none of its",
        ),
        ({"transformer.x.lokr_w1": torch.ones(2, 2), "transformer.x.lokr_w2": torch.ones(2, 2)}, "is not applied to a"),
        (
            {f"transformer.x.{p}": torch.ones(2, 2) for p in ("lora_A.weight", "lora_B.weight", "dora_scale")},
            r"dora_scale \(DoRA\) is not applied",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    pipe = CASES["aura_flow"].build()
    with pytest.raises(ExpertsError, match=message) as caught:
        attach_experts(pipe, PhasedExperts.from_lora_files(TWO, save(tmp_path / "x.safetensors", tensors)))
    assert "\n" not in str(caught.value)
    assert not getattr(pipe.transformer, "peft_config", None)
