"""The time line of a node before anything runs, from the widgets of the nodes that lead to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..pdmd_core.phases import PhasePlan
from .errors import NodeError
from .expert_nodes import NO_LORA, ExpertsFromLoRAs, LoadExperts
from .language import said
from .loading import FROM_HUB, open_experts
from .notices import advice, note_of
from .plan_nodes import PlanFromBoundary, PlanFromExperts, PlanFromPreset, PlanFromSigmas, PlanFromSteps
from .runs import Run, run_of
from .timeline import report, timeline
from .widget_text import Cfg, read_cfgs

_PLANS = {
    kind.define_schema().node_id: kind for kind in (PlanFromSteps, PlanFromPreset, PlanFromBoundary, PlanFromSigmas)
} | {"PhasedDMDPlanFromExperts": PlanFromExperts}
_CARRY = {*_PLANS, "PhasedDMDLoadExperts", "PhasedDMDExperts", "PhasedDMDExpertsLoRA"}
"""The nodes whose plan or MODEL has a time line."""


def preview(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the run of a node.

    Args:
        asked: ``node``, its class; ``inputs``, its widgets; ``from``, the nodes that its sockets ``plan`` and ``model``
            come from, in the same form; ``unknown``, widgets whose values other nodes compute.

    Returns:
        What ``timeline.timeline`` returns; of a report also its ``text``.

    Raises:
        NodeError: If this cannot be told before a run, in words.
        PhasePlanError: If the widgets make no plan.
        ExpertsError: If an experts folder is damaged.
    """
    known = _experts_of(asked)
    plan, cfgs, strengths = known.plan, known.cfgs, known.strengths
    inputs, kind = asked["inputs"], asked["node"]
    if kind in ("PhasedDMDSigmas", "PhasedDMDSampler"):
        run = run_of(plan, int(inputs["steps"]), float(inputs["denoise"]))
        if kind == "PhasedDMDSigmas":
            return timeline(plan, cfgs, run, strengths)
        cfgs = [float(inputs["cfg"]) if cfg is None else cfg for cfg in cfgs or [None] * len(plan)]
        note = note_of(plan, run, cfgs, strengths if known.guidance is None else None)
        return timeline(plan, cfgs, run, strengths, note)
    if kind == "PhasedDMDPlanReport":
        given = asked.get("from", {}).get("sigmas", {}).get("inputs")
        run = Run.of(plan) if given is None else run_of(plan, int(given["steps"]), float(given["denoise"]))
        text = report(plan, run.sigmas, advice(plan, run.sigmas), cfgs)
        return {**timeline(plan, cfgs, run, strengths), "text": said(text)}
    return timeline(plan, cfgs, strengths=strengths, note=known.note)


@dataclass(frozen=True)
class _Known:
    """What the widgets of nodes tell of experts."""

    plan: PhasePlan
    cfgs: Sequence[Cfg] | None = None
    strengths: Sequence[float | None] | None = None
    guidance: float | None = None
    note: str | None = None


def _experts_of(asked: Mapping[str, Any]) -> _Known:
    kind, inputs, sources = asked["node"], asked["inputs"], asked.get("from", {})
    if asked.get("unknown"):
        raise NodeError(f"shown after a run: other nodes compute {', '.join(map(str, asked['unknown']))}")
    if kind in _PLANS:
        known = {entry.id for entry in _PLANS[kind].define_schema().inputs}
        return _Known(_PLANS[kind].plan(**{key: value for key, value in inputs.items() if key in known}))
    if kind == "PhasedDMDLoadExperts":
        if inputs["experts"] == FROM_HUB:
            raise NodeError("shown after a run: the experts are on the Hub")
        manifest = open_experts(inputs["experts"]).manifest
        each = inputs.get("expert_strengths", "")
        parts = LoadExperts.parts(manifest, inputs["cfg"], float(inputs["strength"]), each)
        loras = [manifest.experts[k].kind == "lora" for k in parts.phases]
        return _Known(parts.plan, parts.cfgs, _where(loras, parts.strengths), manifest.guidance_scale)
    if kind in ("PhasedDMDExperts", "PhasedDMDExpertsLoRA") and "plan" in sources:
        plan = _experts_of(sources["plan"]).plan
        if kind == "PhasedDMDExperts":
            return _Known(plan, read_cfgs(inputs["cfg"], plan))
        parts = ExpertsFromLoRAs.parts(plan, inputs["cfg"], inputs.get("strengths", ""), inputs)
        loras = [inputs[f"lora_{k + 1}"] != NO_LORA for k in parts.phases]
        note = next(iter(ExpertsFromLoRAs.misplaced(plan, inputs)), None)
        return _Known(parts.plan, parts.cfgs, _where(loras, parts.strengths), note=note)
    for socket in ("plan", "model"):
        if socket in sources and sources[socket]["node"] in _CARRY:
            return _experts_of(sources[socket])
    if "model" in sources:
        raise NodeError("this MODEL carries no phased experts")
    raise NodeError("connect a plan" if kind != "PhasedDMDSampler" else "connect a MODEL of phased experts")


def _where(loras: Sequence[bool], strengths: Sequence[float]) -> list[float | None]:
    return [strength if lora else None for lora, strength in zip(loras, strengths, strict=True)]
