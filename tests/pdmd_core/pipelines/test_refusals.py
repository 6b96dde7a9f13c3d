"""Pipelines in which experts cannot run are refused by the real reason, and stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers import UniPCMultistepScheduler as UniPC

from pdmd_core.experts import ExpertsError
from pdmd_core.pipelines import attach_experts
from pdmd_core.pipelines.refusals import REASONS, reason_against
from tests.helpers.diffusers_pipelines.build import build, call_of
from tests.helpers.diffusers_pipelines.outcome import of_this_version, rows
from tests.helpers.families.cases import CASES
from tests.helpers.families.parts import picture
from tests.helpers.pipeline_state import assert_same, state_of
from tests.helpers.tiny_pipelines import KINDS, PLAN


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (DDIMScheduler(), "its DDIMScheduler does not step along a rectified flow"),
        (UniPC(), "its UniPCMultistepScheduler does not step along a rectified flow"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "its sigmas run from 0 for noise to 1"),
    ],
    ids=["noise", "noise, of a class that can do both", "inverted"],
)
def test_a_scheduler_of_another_process_is_refused(scheduler: Any, reason: str, kind: str, tmp_path: Path) -> None:
    pipe = CASES["wan"].build()
    folder = KINDS[kind](tmp_path, pipe, PLAN)
    pipe.scheduler = scheduler
    before = state_of(pipe)
    with pytest.raises(ExpertsError, match=f"a WanPipeline takes no phased experts: {reason}"):
        attach_experts(pipe, folder)
    assert_same(pipe, before)


@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchHeunDiscreteScheduler(), UniPC(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_any_scheduler_of_a_rectified_flow_gives_way(scheduler: Any, tmp_path: Path) -> None:
    pipe = CASES["wan"].build()
    folder = KINDS["full"](tmp_path, pipe, PLAN)
    pipe.scheduler = scheduler
    assert attach_experts(pipe, folder).scheduler.plan == PLAN


def test_pipelines_of_pipelines_and_those_that_guide_with_another_network_are_refused() -> None:
    pipe = CASES["flux"].build()
    assert reason_against(pipe) is None
    pipe.set_pag_applied_layers = None
    assert "perturbed attention" in reason_against(pipe)
    pipe = CASES["flux"].build()
    pipe.generation_pipe = CASES["flux"].build()
    assert reason_against(pipe).endswith("attach them to pipe.generation_pipe")


@pytest.mark.parametrize(
    ("name", "asked", "reason"),
    [
        (
            "StableAudio3AudioToAudioPipeline",
            {"init_noise_level": 0.5},
            "starts midway, at sigma 0.5,.*init_noise_level=1",
        ),
        ("QwenImage21Pipeline", {"use_kv_cache": True}, "keeps the first expert's keys and values for all others"),
        ("GlmImagePipeline", {"image": picture()}, "keeps the first expert's keys and values of a picture"),
    ],
)
def test_a_call_that_would_sample_past_the_experts_is_refused(
    name: str, asked: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    if not of_this_version() and not hasattr(diffusers, name):
        pytest.skip("newer than this diffusers")
    pipe = build(name)
    attach_experts(pipe, KINDS["full"](tmp_path, pipe, PLAN))
    with pytest.raises(ValueError, match=reason):
        pipe(**call_of(name) | asked)


def test_classes_that_are_refused_by_name_exist() -> None:
    assert set(REASONS) <= set(rows())
