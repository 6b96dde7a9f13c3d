"""Modular diffusers on the networks of a phased pipeline: LoRA experts switch below it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.modular_pipelines import QwenImageAutoBlocks

from pdmd_core.phases import PhasePlan
from pdmd_core.pipelines import attach_experts
from tests.helpers.families.cases import CASES
from tests.helpers.tiny_pipelines import full_experts, lora_experts

PLAN = PhasePlan.from_steps([1, 2, 1], shift=3.0)


def modular_of(pipe: DiffusionPipeline) -> Any:
    modular = QwenImageAutoBlocks().init_pipeline()
    expected = {component.name for component in modular.blocks.expected_components}
    modular.update_components(
        guider=ClassifierFreeGuidance(guidance_scale=1.0),
        **{name: component for name, component in pipe.components.items() if name in expected},
    )
    modular.set_progress_bar_config(disable=True)
    return modular


def test_a_modular_pipeline_samples_what_the_pipeline_samples(tmp_path: Path) -> None:
    case = CASES["qwen_image"]
    pipe, (height, width, _) = case.build(), case.size
    pipe.vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)  # modular latents are without them
    attach_experts(pipe, lora_experts(tmp_path, pipe, PLAN))
    modular = modular_of(pipe)
    for seed in (3, 4):
        call = {**case.call, "generator": torch.Generator().manual_seed(seed)}
        sampled = modular(**call, num_inference_steps=4, output="latents")
        call["generator"] = torch.Generator().manual_seed(seed)
        expected = pipe(**call, output_type="latent", return_dict=False)[0]
        assert torch.equal(pipe._pack_latents(sampled, 1, 4, height // 4, width // 4), expected)
    assert modular(**case.call, num_inference_steps=4, output="images")[0].size == (width, height)


def test_what_would_be_wrong_is_an_error(tmp_path: Path) -> None:
    case = CASES["qwen_image"]
    pipe = case.build()
    attach_experts(pipe, lora_experts(tmp_path / "lora", pipe, PLAN))
    modular = modular_of(pipe)
    with pytest.raises(ValueError, match="distilled for 4 steps, found 50"):
        modular(**case.call, num_inference_steps=50, output="latents")
    modular.update_components(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    with pytest.raises(RuntimeError, match="another scheduler walks this pipeline"):
        modular(**case.call, num_inference_steps=4, output="latents")
    pipe = case.build()
    attach_experts(pipe, full_experts(tmp_path / "full", pipe, PLAN))
    with pytest.raises(RuntimeError, match="this pipeline does not switch experts"):
        modular_of(pipe)(**case.call, num_inference_steps=4, output="latents")
