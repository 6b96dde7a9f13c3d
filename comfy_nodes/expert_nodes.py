"""Nodes that make one MODEL of several experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..pdmd_core.experts import Manifest
from ..pdmd_core.experts.convert.released import open_lora, open_source
from ..pdmd_core.experts.errors import ExpertsError
from ..pdmd_core.experts.format.header import read_header
from ..pdmd_core.phases import PhasePlan
from .bypass import BESIDE, LORA_WEIGHTS
from .composite import Expert, compose
from .errors import NodeError, in_words
from .language import said
from .loaded import let_go
from .loading import FROM_HUB, base_warnings, expert_model, experts_names, fingerprint, open_experts
from .loras import Lora, apply_lora
from .notices import warn_of_base, warn_of_loras
from .parts import Parts, in_parts
from .schema import Plan, cfg_input, lora_weights_input, plan_input, schema, shift_input, strengths_input
from .slots import slot_warnings
from .timeline import timeline
from .widget_text import TRAINED, read_cfgs, read_strengths

MAX_MODELS, MAX_LORAS, NO_LORA = 6, 4, "none"
_MODEL = "Carries all experts and switches between them by sigma inside one sampler run; for any sampler node."


class LoadExperts(io.ComfyNode):
    """The node that loads an experts folder, or experts of the Hub, onto their base."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return schema(
            "PhasedDMDLoadExperts",
            display_name="Load Phased Experts",
            description="The experts of a folder (or of a Hub repository) on their base, as one MODEL for any sampler.",
            search_aliases=["phased dmd", "lightning", "4 step lora", "wan moe", "high noise low noise", "distilled"],
            inputs=[
                io.Combo.Input(
                    "experts",
                    options=experts_names(hub=True),
                    tooltip="A folder in models/phased_experts with its phased_experts.json, or (Hub id).",
                ),
                io.String.Input(
                    "hub_id",
                    default="",
                    tooltip="user/name on the Hugging Face Hub, or the address of a page of it; is downloaded.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Strength of LoRA experts; 1 is what was trained. No effect on full experts.",
                ),
                cfg_input(TRAINED),
                shift_input(),
                io.Model.Input(
                    "base_1",
                    optional=True,
                    tooltip="The model that the experts were distilled from; of two networks the high-noise one. "
                    "Needed for LoRA experts. Put LoRAs of your own after this node: they go to all experts.",
                ),
                io.Model.Input(
                    "base_2", optional=True, tooltip="The low-noise network, when the base has two (Wan2.2 14B)."
                ),
                strengths_input("expert_strengths", "LoRA expert", "strength"),
                lora_weights_input(),
            ],
            outputs=[
                io.Model.Output(tooltip=_MODEL),
                Plan.Output(display_name="plan", tooltip="The plan that the experts were distilled for."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, experts: str, **inputs: Any) -> str:
        """Return what changes when the folder does, so that ComfyUI runs the node again."""
        return fingerprint(experts)

    @classmethod
    def validate_inputs(cls, experts: str, hub_id: str) -> bool | str:
        """Check the choice; taking ``experts`` in turns off the check against a list that is older than the folder."""
        if experts == FROM_HUB and not hub_id.strip():
            return said("give a Hub id (user/name) or pick an experts folder in models/phased_experts")
        return True

    @classmethod
    @in_words
    def execute(
        cls,
        experts: str,
        hub_id: str,
        strength: float,
        cfg: Any,
        set_shift: bool,
        base_1: Any = None,
        base_2: Any = None,
        expert_strengths: Any = "",
        lora_weights: str = LORA_WEIGHTS[0],
    ) -> io.NodeOutput:
        """Load the experts and compose them."""
        opened = open_experts(experts, hub_id)
        manifest = opened.manifest
        parts = cls.parts(manifest, cfg, strength, expert_strengths)
        given = {"transformer": base_1, "transformer_2": base_2}
        bases = {component: model for component, model in given.items() if model is not None}
        warnings: list[str] = []
        entries = []
        for k, each, value in zip(parts.phases, parts.strengths, parts.cfgs, strict=True):
            expert = manifest.experts[k]
            shown = each if expert.kind == "lora" else None
            made = expert_model(opened, expert, bases, each, warnings.append, lora_weights == BESIDE)
            entries.append(Expert(made, value, shown, manifest.guidance_scale))
        warnings = [*dict.fromkeys(warnings)]  # an expert of several strengths warns once
        let_go()
        warnings += base_warnings(opened, bases)
        warn_of_base(warnings)
        model = compose(parts.plan, entries, set_shift, warnings)
        return io.NodeOutput(model, parts.plan, ui={"phase_plan": [timeline_of(entries, parts.plan, warnings)]})

    @staticmethod
    def parts(manifest: Manifest, cfg: Any, strength: float, each: Any) -> Parts:
        """Read cfg and strengths, times those of the manifest; experts without a LoRA have none to change."""
        given = [
            value if expert.kind == "lora" else 1.0
            for expert, value in zip(manifest.experts, read_strengths(each, manifest.plan), strict=True)
        ]
        factors = [strength * expert.strength for expert in manifest.experts]
        return in_parts(manifest.plan, given, read_cfgs(cfg, manifest.plan, manifest.guidance_scale), factors)


class ExpertsFromModels(io.ComfyNode):
    """The node that composes MODELs of any kind."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        models = [
            io.Model.Input(
                f"model_{k}",
                optional=k > 1,
                tooltip=f"Runs in phase {k} of the plan{', the noisiest' if k == 1 else ''}. Any MODEL: full, GGUF or "
                "fp8, with LoRAs.",
            )
            for k in range(1, MAX_MODELS + 1)
        ]
        return schema(
            "PhasedDMDExperts",
            display_name="Phased Experts (models)",
            description="One MODEL of several: each runs in its phase of the plan. Wan2.2's high and low noise models "
            "in one sampler, without splitting steps by hand.",
            search_aliases=["phased dmd", "wan moe", "high noise low noise", "switch model", "two stage sampler"],
            inputs=[plan_input(), cfg_input(), shift_input(), *models],
            outputs=[io.Model.Output(tooltip=_MODEL)],
        )

    @classmethod
    @in_words
    def execute(cls, plan: PhasePlan, cfg: Any, set_shift: bool, **models: Any) -> io.NodeOutput:
        """Compose the connected MODELs."""
        connected = [models.get(f"model_{k}") for k in range(1, MAX_MODELS + 1)]
        names = [phase.name for phase in plan.phases]
        if len(names) > MAX_MODELS:
            raise NodeError(f"this node takes up to {MAX_MODELS} MODELs, the plan has {len(names)} phases")
        missing = [f"model_{k + 1} ({name})" for k, name in enumerate(names) if connected[k] is None]
        if missing:
            raise NodeError(f"the plan has {len(names)} phase(s), no MODEL is connected to {', '.join(missing)}")
        extra = [f"model_{k + 1}" for k in range(len(names), MAX_MODELS) if connected[k] is not None]
        if extra:
            raise NodeError(f"the plan has {len(names)} phase(s), {', '.join(extra)} would never run: disconnect it")
        experts = [Expert(connected[k], value) for k, value in enumerate(read_cfgs(cfg, plan))]
        return io.NodeOutput(compose(plan, experts, set_shift), ui={"phase_plan": [timeline_of(experts, plan)]})


class ExpertsFromLoRAs(io.ComfyNode):
    """The node that composes LoRAs on one base."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        files = [NO_LORA, *folder_paths.get_filename_list("loras")]
        loras = []
        for k in range(1, MAX_LORAS + 1):
            loras += [
                io.Combo.Input(
                    f"lora_{k}",
                    options=files,
                    default=NO_LORA,
                    tooltip=f"LoRA of phase {k}. none: the base itself runs there (an undistilled step wants a cfg of "
                    "its own above).",
                ),
                io.Float.Input(
                    f"strength_{k}", default=1.0, min=-10.0, max=10.0, step=0.01, tooltip=f"Strength of lora_{k}."
                ),
            ]
        return schema(
            "PhasedDMDExpertsLoRA",
            display_name="Phased Experts (LoRA)",
            description="One MODEL of one base and a LoRA for each phase; the base is in memory once.",
            search_aliases=["phased dmd", "lightning lora", "lora schedule", "lora by step", "undistilled first step"],
            inputs=[
                io.Model.Input("model", tooltip="The base of all LoRAs."),
                plan_input(),
                cfg_input(),
                shift_input(),
                *loras,
                strengths_input("strengths", "LoRA", "its strength above"),
                lora_weights_input(),
            ],
            outputs=[io.Model.Output(tooltip=_MODEL)],
        )

    @classmethod
    @in_words
    def execute(
        cls,
        model: Any,
        plan: PhasePlan,
        cfg: Any,
        set_shift: bool,
        strengths: Any = "",
        lora_weights: str = LORA_WEIGHTS[0],
        **loras: Any,
    ) -> io.NodeOutput:
        """Put the LoRAs onto the base and compose them."""
        names = [phase.name for phase in plan.phases]
        parts = cls.parts(plan, cfg, strengths, loras)
        chosen = [loras[f"lora_{k}"] for k in range(1, MAX_LORAS + 1)]
        extra = [f"lora_{k + 1}" for k in range(len(names), MAX_LORAS) if chosen[k] != NO_LORA]
        if extra:
            raise NodeError(f"the plan has {len(names)} phase(s), {', '.join(extra)} would never run: set it to none")
        if all(name == NO_LORA for name in chosen):
            raise NodeError("no LoRA is chosen for any phase: choose at least one")
        misplaced = cls.misplaced(plan, loras)
        sources = [None if name == NO_LORA else _lora(name) for name in chosen[: len(names)]]
        experts, warnings = [], list[str]()
        for k, strength, value in zip(parts.phases, parts.strengths, parts.cfgs, strict=True):
            source = sources[k]
            if source is None:
                experts.append(Expert(model, value))
            else:
                made = apply_lora(model, source, strength, warnings.append, lora_weights == BESIDE)
                experts.append(Expert(made, value, strength))
        warnings = [*dict.fromkeys(warnings)]  # a LoRA of several strengths warns once
        warn_of_loras(warnings, misplaced)
        composed = compose(parts.plan, experts, set_shift, [*misplaced, *warnings])
        shown = timeline_of(experts, parts.plan, misplaced)
        return io.NodeOutput(composed, ui={"phase_plan": [shown]})

    @staticmethod
    def misplaced(plan: PhasePlan, inputs: Mapping[str, Any]) -> list[str]:
        """Say which LoRAs are in slots of other phases; a file that cannot be read says so when it is loaded."""
        names = [inputs[f"lora_{k}"] for k in range(1, len(plan) + 1)]
        metadata: list[Mapping[str, str]] = []
        for name in names:
            path = None if name == NO_LORA else folder_paths.get_full_path("loras", name)
            try:
                metadata.append(read_header(Path(path)).metadata if path else {})
            except ExpertsError:
                metadata.append({})
        return slot_warnings(plan, [None if name == NO_LORA else name for name in names], metadata)

    @staticmethod
    def parts(plan: PhasePlan, cfg: Any, strengths: Any, inputs: Mapping[str, Any]) -> Parts:
        """Read cfg and strengths; phases without a LoRA have none to change."""
        if len(plan) > MAX_LORAS:
            raise NodeError(
                f"up to {MAX_LORAS} phases fit this node, the plan has {len(plan)}: use Phased Experts (models)"
            )
        given = []
        for k, value in enumerate(read_strengths(strengths, plan), start=1):
            own = float(inputs[f"strength_{k}"]) if inputs[f"lora_{k}"] != NO_LORA else None
            each = value if isinstance(value, tuple) else (value,)
            scaled = tuple(1.0 if own is None else own * number for number in each)
            given.append(scaled if len(scaled) > 1 else scaled[0])
        return in_parts(plan, given, read_cfgs(cfg, plan))


def timeline_of(experts: Sequence[Expert], plan: PhasePlan, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Describe experts under their plan, for the front end."""
    strengths = [expert.strength for expert in experts]
    return timeline(plan, [expert.cfg for expert in experts], strengths=strengths, note=next(iter(notes), None))


def _lora(file: str) -> Lora:
    source = open_source(Path(folder_paths.get_full_path_or_raise("loras", file)), own=True)
    weights = open_lora(source.path)
    return Lora({name: weights.read(name) for name in weights.specs}, source.alphas, file)
