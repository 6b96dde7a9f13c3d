"""The all-in-one sampler node."""

from __future__ import annotations

import logging
from typing import Any

import comfy.samplers
import nodes
import torch
from comfy_api.latest import io

from .composite import composite_of
from .errors import NodeError, in_words
from .notices import note_of, on_time_line, say_where_it_starts
from .phase_samplers import sampler_of_phases
from .runs import DENOISE, run_of
from .schema import schema
from .timeline import timeline

logger = logging.getLogger(__name__)


class PhasedSampler(io.ComfyNode):
    """The node that samples a MODEL of phased experts on the sigmas they were trained on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return schema(
            "PhasedDMDSampler",
            display_name="Phased Sampler",
            description="Samples a MODEL that carries phased experts, on exactly the sigmas they were trained on.",
            search_aliases=["phased dmd", "ksampler", "wan moe sampler", "4 step sampler"],
            inputs=[
                io.Model.Input("model", tooltip="From Load Phased Experts or a Phased Experts node."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the noise.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="0: the steps that the experts were trained for. More go between them. A MODEL without "
                    "experts (a bypassed node) takes the steps that you give.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance of experts without a cfg of their own. Distilled experts want 1.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.SAMPLER_NAMES,
                    default="euler",
                    tooltip="euler is what the experts were trained with.",
                ),
                io.Conditioning.Input("positive", tooltip="What to show."),
                io.Conditioning.Input("negative", tooltip="What to avoid; only cfg other than 1 looks at it."),
                io.Latent.Input("latent_image", tooltip="Empty, or an image to start from with denoise below 1."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=f"1: from noise. {DENOISE}",
                ),
                io.String.Input(
                    "samplers",
                    default="",
                    optional=True,
                    tooltip="A sampler for each phase with commas between (heun, euler). Empty: sampler_name for all.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The sampled latent.")],
        )

    @classmethod
    @in_words
    def execute(
        cls,
        model: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        denoise: float,
        samplers: str = "",
    ) -> io.NodeOutput:
        """Sample."""
        composite = composite_of(model)
        if composite is None:
            sigmas, shown = sigmas_of_plain(model, sampler_name, steps, denoise), None
            sampler_of_run = comfy.samplers.sampler_object(sampler_name)
        else:
            plan, experts = composite.plan, composite.experts
            run = run_of(plan, steps, denoise)
            say_where_it_starts(denoise, run)
            cfgs = [cfg if expert.cfg is None else expert.cfg for expert in experts]
            strengths = [expert.strength for expert in experts]
            few_step = [expert.strength if expert.guidance is None else None for expert in experts]
            shown = {"phase_plan": [timeline(plan, cfgs, run, strengths, note_of(plan, run, cfgs, few_step))]}
            sigmas = torch.tensor(run.sigmas, dtype=torch.float32)
            sampler_of_run = sampler_of_phases(plan, samplers, sampler_name)
        core = nodes.NODE_CLASS_MAPPINGS["SamplerCustom"]
        sample = core.execute if hasattr(core, "execute") else core().sample
        with on_time_line():
            output = sample(
                model=model,
                add_noise=True,
                noise_seed=seed,
                cfg=cfg,
                positive=positive,
                negative=negative,
                sampler=sampler_of_run,
                sigmas=sigmas,
                latent_image=latent_image,
            )
        return io.NodeOutput(output[0], ui=shown)


def sigmas_of_plain(model: Any, sampler_name: str, steps: int, denoise: float) -> torch.Tensor:
    """Compute what KSampler with scheduler simple takes, for a MODEL without experts.

    Args:
        model: The MODEL, such as the base that a bypassed node lets through.
        sampler_name: The sampler, on which this depends.
        steps: The number of steps.
        denoise: How much of the noise range these steps sample.

    Returns:
        The sigmas.

    Raises:
        NodeError: If no number of steps is given.
    """
    if not steps:
        raise NodeError(
            "this MODEL carries no phased experts: put Load Phased Experts or Phased Experts before it (a bypassed one "
            "lets the base through), or give steps, such as 20, to sample it alone"
        )
    logger.warning(f"Phased Sampler: this MODEL carries no phased experts, it runs alone: {steps} steps of simple")
    return comfy.samplers.KSampler(model, steps, torch.device("cpu"), sampler_name, "simple", denoise).sigmas
