"""Changes of weights that are no LoRA: where they cannot be, that is said and nothing is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pdmd_core.experts import ExpertsError, PhasedExperts
from pdmd_core.experts.lora.changes import Dense
from pdmd_core.families import family
from pdmd_core.pipelines import attach_experts
from pdmd_core.pipelines.differences import Differences, weight_shapes
from tests.helpers.families.cases import CASES
from tests.helpers.lora_layouts import added, save, wan_of_2026
from tests.helpers.pipeline_state import assert_same, state_of
from tests.helpers.tiny import transformer
from tests.helpers.tiny_pipelines import PLAN, euler

WAN = family("wan")


@pytest.fixture
def experts(tmp_path: Path) -> PhasedExperts:
    files = [save(tmp_path / f"{n}.safetensors", wan_of_2026(transformer(), WAN, n)[0]) for n in (1, 2)]
    return PhasedExperts.from_lora_files(PLAN, *files, components=["transformer"] * 2)


def offload(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(torch.device("cpu"), num_blocks_per_group=1, offload_type="block_level")


def test_weights_that_are_offloaded_in_parts_are_not_changed(experts: PhasedExperts) -> None:
    pipe = CASES["wan"].build()
    offload(pipe)
    before = state_of(pipe)
    with pytest.raises(ExpertsError, match=r"changes weights that are no LoRA .* offloaded in parts: offload whole"):
        attach_experts(pipe, experts)
    assert_same(pipe, before)
    pipe = attach_experts(CASES["wan"].build(), experts)
    offload(pipe)
    with pytest.raises(RuntimeError, match="on a network that is offloaded in parts: offload whole models"):
        CASES["wan"].sample(pipe)


def test_they_stay_right_when_a_call_is_interrupted_and_in_bfloat16(experts: PhasedExperts, tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = attach_experts(case.build(), experts)
    expected = case.sample(pipe)

    def interrupt(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        case.sample(pipe, callback_on_step_end=interrupt)
    assert torch.equal(case.sample(pipe), expected)
    networks = [added(transformer(), wan_of_2026(transformer(), WAN, n)[1]) for n in (1, 2)]
    torch.testing.assert_close(expected, euler(case, PLAN, networks), rtol=1e-4, atol=1e-4)
    low = attach_experts(case.build().to(torch.bfloat16), experts)
    changed = low.phased.switches["transformer"].differences.of_phase[1]["blocks.0.attn1.norm_q.weight"]
    whole = dict(networks[1].named_parameters())["blocks.0.attn1.norm_q.weight"]
    assert torch.equal(changed.float(), whole.to(torch.bfloat16).float()), "rounded once"


def test_a_packed_weight_is_refused_and_its_shape_is_known() -> None:
    network = nn.Sequential(nn.Linear(4, 6))
    network[0].weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
    assert weight_shapes(network) == {"0.weight": (6, 4), "0.bias": (6,)}
    with pytest.raises(ExpertsError, match=r"x changes 0.weight, which is quantised in this pipeline"):
        Differences(network).add(0, {"0.weight": [Dense(torch.ones(6, 4))]}, "x")
