"""Nodes that make a phase plan, its sigmas, and the report on them."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from comfy_api.latest import io

from ..pdmd_core.boundary_plan import BoundaryPlan
from ..pdmd_core.noise_level import shift_sigma, unshift_sigma
from ..pdmd_core.phases import Phase, PhasePlan
from ..pdmd_core.presets import PRESETS
from .composite import composite_of
from .errors import in_words
from .language import language, said
from .loading import experts_names, fingerprint, open_experts
from .notices import advice
from .runs import DENOISE, Run, run_of
from .schema import Plan, plan_input, schema, text_input
from .timeline import draw, report, timeline
from .widget_text import read_boundaries, read_names, read_numbers, read_sigmas, read_steps

_NAMES = {
    "default": "",
    "optional": True,
    "tooltip": "Names of the experts with commas between (high noise, low noise). Empty: default names.",
}
UNDISTILLED = "undistilled"
"""The name of the phase that the base runs without its few-step LoRA."""


_NOTHING = "connect a plan, or the MODEL of Load Phased Experts or Phased Experts"
_PLAIN = f"this MODEL carries no phased experts: {_NOTHING}"


class PlanNode(io.ComfyNode):
    """A node that makes a plan from widgets alone; the front end asks for it while widgets move."""

    @classmethod
    def plan(cls, *args: Any, **inputs: Any) -> PhasePlan:
        """Make the plan of these widget values."""
        raise NotImplementedError

    @classmethod
    @in_words
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        """Make the plan, and show it on the node."""
        plan = cls.plan(**inputs)
        return io.NodeOutput(plan, ui={"phase_plan": [timeline(plan)]})


class PlanFromSteps(PlanNode):
    """The node that makes a plan from steps and shift."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return schema(
            "PhasedDMDPlanFromSteps",
            display_name="Phase Plan (steps)",
            description="Which expert runs at which sigma: a number of steps for each phase, uniform in time, then "
            "shifted. 2, 2 at shift 5 is the usual 4-step plan of Wan2.2; shift 3 that of Qwen-Image.",
            search_aliases=["phased dmd", "moe boundary", "high noise low noise", "4 steps", "expert schedule"],
            inputs=[
                text_input(
                    "steps",
                    default="2, 2",
                    tooltip="Steps of each phase, high noise first: 2, 2 are two experts of two steps each.",
                ),
                io.Float.Input(
                    "shift",
                    default=5.0,
                    min=0.01,
                    max=100.0,
                    step=0.01,
                    tooltip="Shift that the experts were trained with: Wan2.2 5, Qwen-Image 3. It is applied here and "
                    "nowhere else.",
                ),
                io.String.Input("names", **_NAMES),
            ],
            outputs=[Plan.Output(display_name="plan", tooltip="The phase plan.")],
        )

    @classmethod
    def plan(cls, steps: Any, shift: float, names: str = "") -> PhasePlan:
        """Make the plan of these widget values."""
        return PhasePlan.from_steps(read_steps(steps), shift, read_names(names))


class PlanFromSigmas(PlanNode):
    """The node that makes a plan from sigmas."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return schema(
            "PhasedDMDPlanFromSigmas",
            display_name="Phase Plan (sigmas)",
            description="Which expert runs at which sigma, given as the sigmas of each phase. The first sigma of a "
            "phase is the boundary where its expert takes over.",
            search_aliases=["phased dmd", "custom sigmas", "moe boundary", "expert schedule"],
            inputs=[
                io.String.Input(
                    "sigmas",
                    default="1, 0.9375 | 5/6, 0.625",
                    tooltip="Sigmas or fractions, descending, commas between, | between phases. 0 is not written.",
                ),
                io.String.Input("names", **_NAMES),
            ],
            outputs=[Plan.Output(display_name="plan", tooltip="The phase plan.")],
        )

    @classmethod
    def plan(cls, sigmas: str, names: str = "") -> PhasePlan:
        """Make the plan of these widget values."""
        return PhasePlan.from_sigmas(read_sigmas(sigmas), read_names(names))


class PlanFromPreset(PlanNode):
    """The node that makes the plan of a released few-step file or model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return schema(
            "PhasedDMDPlanFromPreset",
            display_name="Phase Plan (preset)",
            description="The plan of a well-known few-step LoRA or distilled model, and with undistilled steps first "
            "for more motion: the base runs them without its few-step LoRA and with guidance.",
            search_aliases=["phased dmd", "lightx2v", "lightning", "TripleKSampler", "more motion", "4 steps", "turbo"],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS],
                    tooltip="What was released, and for how many steps. Wan2.2 LoRAs come as a pair: one for each "
                    "phase.",
                ),
                io.Int.Input(
                    "undistilled_steps",
                    default=0,
                    min=0,
                    max=50,
                    tooltip="Steps of the base in the place of the first trained step, as a phase of its own, first: "
                    "give it the MODEL without the few-step LoRA and cfg 3.5. All other steps stay as trained.",
                ),
                io.String.Input("names", **_NAMES),
            ],
            outputs=[Plan.Output(display_name="plan", tooltip="The phase plan.")],
        )

    @classmethod
    def plan(cls, preset: str, undistilled_steps: int = 0, names: str = "") -> PhasePlan:
        """Make the plan of these widget values."""
        plan = PhasePlan.preset(preset)
        if undistilled_steps:
            plan = with_undistilled_steps(plan, undistilled_steps)
        found = read_names(names)
        return plan if found is None else PhasePlan.from_sigmas([phase.sigmas for phase in plan.phases], found)


def with_undistilled_steps(plan: PhasePlan, steps: int) -> PhasePlan:
    """Let another network run to the second trained sigma of a plan.

    Args:
        plan: The plan of few-step experts.
        steps: The number of steps to there, uniform in raw time under the plan's shift.

    Returns:
        The plan with a phase before the others; a phase of a single step gives way to it.
    """
    first, *rest = plan.phases
    shift = plan.shift or 1.0
    end = unshift_sigma((*plan.sigmas, 0.0)[1], shift)
    taken = tuple(shift_sigma(1 - (1 - end) * n / steps, shift) for n in range(steps))
    remaining = [Phase(first.name, first.sigmas[1:])] if len(first.sigmas) > 1 else []
    return PhasePlan((Phase(UNDISTILLED, taken), *remaining, *rest))


class PlanFromBoundary(PlanNode):
    """The node that makes a plan of a boundary alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return schema(
            "PhasedDMDPlanFromBoundary",
            display_name="Phase Plan (boundary)",
            description="For bases of two networks without few-step LoRAs, as Wan2.2 was released: where they hand "
            "over, with any number of steps. No sigma is called untrained.",
            search_aliases=[
                "phased dmd",
                "moe boundary",
                "wan moe sampler",
                "0.875",
                "high noise low noise",
                "20 steps",
            ],
            inputs=[
                text_input(
                    "boundary",
                    default="0.875",
                    tooltip="Sigma of the hand-over: 0.875 for Wan2.2 text to video, 0.9 for image to video, or half "
                    "(of the steps). More networks: 0.9, 0.5.",
                ),
                io.Int.Input("steps", default=20, min=2, max=1000, tooltip="Steps of a whole run."),
                text_input(
                    "shift", default="5", tooltip="Shift of the steps, or one for each network (8, 5). Wan2.2: 5 to 12."
                ),
                io.String.Input("names", **_NAMES),
            ],
            outputs=[Plan.Output(display_name="plan", tooltip="The phase plan.")],
        )

    @classmethod
    def plan(cls, boundary: Any, steps: int, shift: Any, names: str = "") -> PhasePlan:
        """Make the plan of these widget values."""
        boundaries, found = read_boundaries(boundary), read_names(names)
        count = len(boundaries) + 1
        shifts = read_numbers(shift, "shift", found or [f"network {k + 1}" for k in range(count)])
        return BoundaryPlan.at(boundaries, steps, shifts, found)


class PlanFromExperts(PlanNode):
    """The node that reads the plan of an experts folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return schema(
            "PhasedDMDPlanFromExperts",
            display_name="Phase Plan (experts folder)",
            description="The plan that the experts of a folder were distilled for, without loading them.",
            search_aliases=["phased dmd", "phased_experts.json", "expert schedule"],
            inputs=[
                io.Combo.Input(
                    "experts", options=experts_names(), tooltip="A folder in models/phased_experts with its manifest."
                )
            ],
            outputs=[Plan.Output(display_name="plan", tooltip="The phase plan.")],
        )

    @classmethod
    def fingerprint_inputs(cls, experts: str) -> str:
        """Return what changes when the folder does, so that ComfyUI runs the node again."""
        return fingerprint(experts)

    @classmethod
    def plan(cls, experts: str) -> PhasePlan:
        """Read the plan of the folder."""
        return open_experts(experts).manifest.plan


class Sigmas(io.ComfyNode):
    """The node that makes the sigmas of a run under a plan."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return schema(
            "PhasedDMDSigmas",
            display_name="Phased Sigmas",
            description="Exactly the sigmas that the experts were trained on, for SamplerCustomAdvanced.",
            search_aliases=["phased dmd", "exact sigmas", "few step scheduler", "basic scheduler"],
            inputs=[
                plan_input(),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="0: the plan's own steps. More: further steps between the trained ones, which all stay.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=f"1: from noise. {DENOISE}",
                ),
            ],
            outputs=[io.Sigmas.Output(tooltip="Descending, with the final 0.")],
        )

    @classmethod
    @in_words
    def execute(cls, plan: PhasePlan, steps: int, denoise: float) -> io.NodeOutput:
        """Compute the sigmas."""
        run = run_of(plan, steps, denoise)
        shown = timeline(plan, run=run)
        return io.NodeOutput(torch.tensor(run.sigmas, dtype=torch.float32), ui={"phase_plan": [shown]})


class PlanReport(io.ComfyNode):
    """The node that shows a plan, and what is wrong with sigmas under it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return schema(
            "PhasedDMDPlanReport",
            display_name="Phase Plan Report",
            description="Which expert runs which step at which sigma and SNR, in words and as a picture, and what to "
            "do when connected SIGMAS are not those that the experts were trained on.",
            search_aliases=["phased dmd", "check sigmas", "debug sigmas", "moe boundary", "which expert"],
            inputs=[
                plan_input(optional=True),
                io.Model.Input(
                    "model", optional=True, tooltip="Or a MODEL that carries phased experts: its plan and cfg."
                ),
                io.Sigmas.Input(
                    "sigmas", optional=True, tooltip="SIGMAS of the run to check; without them the plan's own."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="The time line."),
                io.String.Output(display_name="text", tooltip="The same in words; what to change comes first."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Return the language, so that who reads another one gets a new report."""
        return language()

    @classmethod
    @in_words
    def execute(cls, plan: PhasePlan | None = None, model: Any = None, sigmas: Any = None) -> io.NodeOutput:
        """Draw and describe the plan, then the warnings."""
        carried = composite_of(model) if model is not None else None
        plan = plan or (carried.plan if carried else None)
        if plan is None:
            text = said(_NOTHING if model is None else _PLAIN)
            return io.NodeOutput(torch.zeros(1, 1, 1, 3), text, ui={"text": (text,)})
        experts = carried.experts if carried and carried.plan == plan else ()
        cfgs = [expert.cfg for expert in experts] or None
        given = [] if sigmas is None else [float(sigma) for sigma in sigmas.flatten()]
        run = Run.of(plan) if sigmas is None else Run(given, [])
        warnings = [] if sigmas is None else advice(plan, given)
        if carried and carried.plan != plan:
            warnings.insert(0, "connect the plan of the MODEL: its experts follow another one than the connected plan")
        warnings += carried.warnings if carried else ()
        text = said(report(plan, run.sigmas, warnings, cfgs))
        pixels = numpy.asarray(draw(plan, run.sigmas, cfgs), dtype=numpy.float32) / 255
        shown = timeline(plan, cfgs, run if len(run.sigmas) > 1 else None, [expert.strength for expert in experts])
        return io.NodeOutput(torch.from_numpy(pixels)[None], text, ui={"text": (text,), "phase_plan": [shown]})
