"""The shipped teacher with experts gives the same picture in ComfyUI and in diffusers, from the same noise."""

from __future__ import annotations

import numpy as np
import torch

from tests.comfyui.test_server import pixels, workflow
from tests.helpers.comfyui.server import Server

TOLERANCE = 2
"""Of 255. Two programs, two orders of rounding: weights stored in float16 are read into float32 by both."""


def test_the_same_picture_in_diffusers(server: Server) -> None:
    from diffusers import DiffusionPipeline

    from pdmd_core.scheduler import PhasedDMDScheduler
    from tests.comfyui.conftest import EXPERTS
    from tests.comfyui.test_diffusers_folder import PROMPT, TEACHER
    from tests.helpers.comfyui.server import REPOSITORY

    found = pixels(server, server.run(workflow(11, "same")))

    stand_in = server.base / "models/phased_experts" / EXPERTS
    experts = stand_in if stand_in.is_dir() else REPOSITORY / "training" / EXPERTS
    from pdmd_core.experts import PhasedExperts

    plan = PhasedExperts.open(experts).manifest.plan
    names = [phase.name for phase in plan.phases]
    pipe = DiffusionPipeline.from_pretrained(TEACHER, scheduler=PhasedDMDScheduler.from_plan(plan), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for name in names:
        pipe.load_lora_weights(experts, weight_name=f"{name}.safetensors", adapter_name=name)

    def use_expert_of_next_step(pipe, step, timestep, tensors):
        pipe.set_adapters(names[pipe.scheduler.phase])
        return tensors

    def sample(**options):
        noise = torch.randn((1, 16, 1, 8, 8), generator=torch.manual_seed(11))
        call = {"width": 64, "height": 64, "num_frames": 1, "max_sequence_length": 16, "output_type": "np"}
        steps = {"num_inference_steps": len(plan.sigmas), "guidance_scale": 1.0}
        return pipe(PROMPT, latents=noise, **call, **steps, **options).frames[0][0]

    pipe.set_adapters(names[0])
    frames = sample(callback_on_step_end=use_expert_of_next_step)
    expected = (frames * 255).round().astype(int)
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= TOLERANCE and difference.mean() < 1, (difference.max(), difference.mean())
    pipe.set_adapters(names[1])  # the test can tell experts apart
    assert np.abs(sample() - frames).max() * 255 > TOLERANCE
