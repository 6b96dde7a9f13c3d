"""What a type checker knows of the code of users. mypy reads this file (pyproject.toml); nothing runs it."""

from __future__ import annotations

from typing import assert_type

from diffusers import DiffusionPipeline

from pdmd_core import (
    PhasedDMDScheduler,
    PhasedExperts,
    PhasedPipeline,
    PhasePlan,
    attach_experts,
    load_phased_pipeline,
)


def use(pipe: DiffusionPipeline) -> None:
    """An ignored error that is none fails (``warn_unused_ignores``), as do types that are not told."""
    phased = attach_experts(pipe, "user/experts", revision="v1", token=None, cache_dir="cache", subfolder="a")
    assert_type(phased, PhasedPipeline)
    assert_type(load_phased_pipeline("user/experts"), PhasedPipeline)
    phased("a panda", num_inference_steps=4).images[0].save("panda.png")
    phased.enable_model_cpu_offload()
    assert_type(phased.phased.plan, PhasePlan)
    assert_type(phased.phased.experts, PhasedExperts | None)
    assert_type(phased.scheduler, PhasedDMDScheduler)
    assert_type(phased.scheduler.phase, int)
    assert_type(PhasedExperts.from_pretrained("user/experts").push_to_hub("user/mine", private=True), str)
    phased.phased.plans()  # type: ignore[attr-defined]
    attach_experts(pipe)  # type: ignore[call-arg]
    attach_experts(pipe, "user/experts", branch="v1")  # type: ignore[call-arg]
