"""The time line of a node before anything runs, from the widgets of the nodes that lead to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..pdmd_core.phases import PhasePlan
from .errors import NodeError
from .expert_nodes import ExpertsFromLoRAs, LoadExperts
from .loading import FROM_HUB, open_experts
from .notices import advice
from .plan_nodes import PlanFromBoundary, PlanFromExperts, PlanFromPreset, PlanFromSigmas, PlanFromSteps, run_of
from .timeline import report, timeline
from .widget_text import Cfg, read_cfgs

_PLANS = {
    kind.define_schema().node_id: kind for kind in (PlanFromSteps, PlanFromPreset, PlanFromBoundary, PlanFromSigmas)
} | {"PhasedDMDPlanFromExperts": PlanFromExperts}


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
    plan, cfgs, strengths = _experts_of(asked)
    inputs, kind = asked["inputs"], asked["node"]
    if kind in ("PhasedDMDSigmas", "PhasedDMDSampler"):
        sigmas, skipped = run_of(plan, int(inputs["steps"]), float(inputs["denoise"]))
        if kind == "PhasedDMDSampler":
            cfgs = [float(inputs["cfg"]) if cfg is None else cfg for cfg in cfgs or [None] * len(plan)]
        return timeline(plan, cfgs, sigmas, skipped, strengths)
    if kind == "PhasedDMDPlanReport":
        shown: list[float] | None = None
        if asked.get("from", {}).get("sigmas", {}).get("node") == "PhasedDMDSigmas":
            given = asked["from"]["sigmas"]["inputs"]
            shown = run_of(plan, int(given["steps"]), float(given["denoise"]))[0]
        text = report(plan, shown, advice(plan, shown) if shown else (), cfgs)
        return {**timeline(plan, cfgs, shown, strengths=strengths), "text": text}
    return timeline(plan, cfgs, strengths=strengths)


def _experts_of(asked: Mapping[str, Any]) -> tuple[PhasePlan, list[Cfg] | None, list[float | None] | None]:
    kind, inputs, sources = asked["node"], asked["inputs"], asked.get("from", {})
    if asked.get("unknown"):
        raise NodeError(f"shown after a run: other nodes compute {', '.join(map(str, asked['unknown']))}")
    if kind in _PLANS:
        known = {entry.id for entry in _PLANS[kind].define_schema().inputs}
        return _PLANS[kind].plan(**{key: value for key, value in inputs.items() if key in known}), None, None
    if kind == "PhasedDMDLoadExperts":
        if inputs["experts"] == FROM_HUB:
            raise NodeError("shown after a run: the experts are on the Hub")
        manifest = open_experts(inputs["experts"]).manifest
        given = LoadExperts.strengths(manifest, inputs["strength"], inputs.get("expert_strengths", ""))
        pairs = zip(manifest.experts, given, strict=True)
        shown = [value if expert.kind == "lora" else None for expert, value in pairs]
        return manifest.plan, read_cfgs(inputs["cfg"], manifest.plan, manifest.guidance_scale), shown
    if kind in ("PhasedDMDExperts", "PhasedDMDExpertsLoRA") and "plan" in sources:
        plan = _experts_of(sources["plan"])[0]
        strengths = ExpertsFromLoRAs.strengths(inputs, len(plan)) if kind.endswith("LoRA") else None
        return plan, read_cfgs(inputs["cfg"], plan), strengths
    for socket in ("plan", "model"):
        if socket in sources and not kind.startswith("PhasedDMDExperts"):
            return _experts_of(sources[socket])
    raise NodeError("connect a plan" if kind != "PhasedDMDSampler" else "connect a MODEL of phased experts")
