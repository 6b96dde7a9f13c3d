"""One MODEL that carries the experts of all phases and hands over inside a sampler run.

The MODEL is a clone of the first expert's ModelPatcher with an attachment (the other experts) and two wrappers. When a
run starts, the expert that owns its first sigma takes the place of the guider's model before anything is loaded; at the
first prediction in another phase the next expert is loaded instead. Which one runs is the phase plan's decision alone.
Nobody's MODEL is changed; the guider is as it was when the run ends, also by an error or an interrupt.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP

from ..pdmd_core.phases import PhasePlan
from ..pdmd_core.sampling import sampling_sigmas
from .additions import BOUND_TO_RUN, PatchSnapshot, with_additions
from .bypass import refuse_what_needs_merged, take_away
from .errors import NodeError, in_words
from .language import said
from .model_options import with_added_options
from .notices import warn_of_sigmas
from .one_network import refuse_what_needs_one_network
from .widget_text import Cfg, cfg_at

logger = logging.getLogger(__name__)

KEY = "phased_dmd"
"""The key of attachment, wrappers and run state."""
_RUN: ContextVar[Run | None] = ContextVar(KEY, default=None)
"""The run in progress."""
_CACHE = "easycache"
"""Where ComfyUI's EasyCache and LazyCache keep what they remember of a run, among the options of the transformer."""


@dataclass(frozen=True)
class Expert:
    """The MODEL that runs in one phase, and its guidance."""

    model: Any
    """The MODEL, as it is without the other experts."""
    cfg: Cfg = None
    """What takes the place of the sampler's cfg in this phase, or in each step of it; None leaves the sampler's."""
    strength: float | None = None
    """The strength of its LoRA, to show it; None where there is none that we know."""
    guidance: float | None = None
    """The guidance that it was distilled for; None where that is not known."""


class Composite:
    """The attachment of a MODEL that carries phased experts.

    Args:
        plan: The phase plan.
        experts: One for each phase; of the first one, ``model`` is only the origin of the carrier.
        snapshot: The state of the first expert when the composite was made.
        warnings: What was found about the experts then, for the report.
    """

    def __init__(
        self, plan: PhasePlan, experts: Sequence[Expert], snapshot: PatchSnapshot, warnings: Sequence[str] = ()
    ) -> None:
        self.plan, self.experts, self.snapshot, self.warnings = plan, tuple(experts), snapshot, tuple(warnings)

    def on_model_patcher_clone(self) -> Composite:
        """Return the attachment of a clone, which is this one: experts are never changed."""
        return self

    def cfgs(self) -> set[float]:
        """Collect the experts' own cfgs."""
        each = [expert.cfg if isinstance(expert.cfg, tuple) else (expert.cfg,) for expert in self.experts]
        return {cfg for cfgs in each for cfg in cfgs if cfg is not None}

    def patcher(self, carrier: Any, k: int) -> Any:
        """Make expert k as a MODEL uses it: what was patched onto the MODEL after it was made goes to every expert."""
        if k == 0:
            return carrier
        return with_additions(self.experts[k].model, carrier, self.snapshot, self.plan.phases[k].name)


class Run:
    """The state of one sampler run, which lives on its guider.

    Args:
        guider: ComfyUI's guider of the run.
        composite: What its MODEL carries.
        sigmas: The sigmas of the run.

    Raises:
        NodeError: If something that was put onto the MODEL does not fit all of its experts.
    """

    def __init__(self, guider: Any, composite: Composite, sigmas: Sequence[float]) -> None:
        self.guider, self.composite, self.carrier, self.sigmas = guider, composite, guider.model_patcher, sigmas
        self.options_at_start = guider.model_options
        self.active = self.index(sigmas[0])
        self._patchers = [composite.patcher(self.carrier, k) for k in range(len(composite.plan))]
        refuse_what_needs_merged(self._patchers, self.carrier, composite.snapshot.parts["patches"])
        for patcher in self._patchers:
            patcher.hook_mode = self.carrier.hook_mode
        self._options: dict[int, dict[str, Any]] = {}
        self._cache: Any = None
        self._switched = False
        self._sigma = sigmas[0]

    def index(self, sigma: float) -> int:
        """Look up the expert of a sigma by the plan.

        Samplers may step to exactly 0, where the last expert ends, and a little above 1 (added noise, SetFirstSigma),
        where the first one begins.
        """
        return self.composite.plan.phase_index(min(sigma, 1.0)) if sigma > 0 else len(self.composite.plan) - 1

    def start(self) -> None:
        """Put the expert of the first sigma in place before ComfyUI loads anything, so that it alone is loaded."""
        self.guider.model_patcher = self._patchers[self.active]
        given, own = getattr(self.guider, "cfg", None), self.composite.cfgs()
        if given is not None and own and own != {given}:
            text = ", ".join(f"{cfg:g}" for cfg in sorted(own))
            logger.info(f"Phased experts: their own cfg, {text}, takes the place of the sampler's, {given:g}")

    def use(self, sigma: float, shape: Sequence[int]) -> None:
        """Load the expert of this sigma unless it is the active one."""
        k, self._sigma = self.index(sigma), sigma
        if k == self.active:
            return
        guider = self.guider
        guider.model_patcher.cleanup()
        guider.model_patcher = self._patchers[k]
        options = self._own_options(k)
        guider.inner_model, _, guider.loaded_models = comfy.sampler_helpers.prepare_sampling(
            guider.model_patcher, shape, guider.conds, options
        )
        guider.model_patcher.pre_run()
        self.active, self._switched, self._cache = k, True, None
        logger.info(f"Phased experts: {self._step(sigma)}{self._name()}, sigma {sigma:.4g}{self._guidance()}")

    def options(self, model_options: dict[str, Any]) -> dict[str, Any]:
        """Return the options of the active expert: its own, and what the sampler has set for this run."""
        if self.active == 0 and not self._switched:
            return model_options
        own = model_options
        if self.active:
            own = with_added_options(self._own_options(self.active), own, self.options_at_start, BOUND_TO_RUN)
        return self._with_own_cache(own)

    def _with_own_cache(self, options: dict[str, Any]) -> dict[str, Any]:
        """Let EasyCache begin anew: what it remembers of one expert's steps says nothing of another's."""
        words = options.get("transformer_options", {})
        if _CACHE not in words:
            return options
        if self._cache is None:
            sampling = self.carrier.get_model_object("model_sampling")
            self._cache = words[_CACHE].clone().prepare_timesteps(sampling)
        return {**options, "transformer_options": {**words, _CACHE: self._cache}}

    def _step(self, sigma: float) -> str:
        """Where in the run this sigma is; nothing for one between steps."""
        near = [k for k, each in enumerate(self.sigmas[:-1]) if math.isclose(each, sigma, rel_tol=1e-4)]
        return f"step {near[0] + 1} of {len(self.sigmas) - 1}: " if near else ""

    def _guidance(self) -> str:
        cfg = self._own_cfg()
        cfg = getattr(self.guider, "cfg", None) if cfg is None else cfg
        return "" if cfg is None else f", cfg {cfg:g}"

    def _own_cfg(self) -> float | None:
        return cfg_at(self.composite.plan, self.active, self.composite.experts[self.active].cfg, self._sigma)

    def cfg(self) -> float | None:
        """Return the cfg of the active expert at this step; None is the sampler's."""
        cfg = self._own_cfg()
        if cfg is None:
            return None
        if "cfg" not in inspect.signature(self.guider.set_cfg).parameters:
            raise NodeError(
                f"expert {self._name()} has a cfg of its own, {cfg:g}, but {type(self.guider).__name__} has no single "
                "cfg to set: use a CFGGuider or KSampler, or leave the experts' cfg empty"
            )
        if cfg != 1 and not self.guider.conds.get("negative"):
            raise NodeError(
                f"expert {self._name()} has cfg {cfg:g}, which needs negative conditioning, and this guider has none: "
                "use a CFGGuider or KSampler with a negative prompt"
            )
        return cfg

    def wrappers(self) -> list[Callable[..., Any]]:
        """Return what wraps the prediction of the active expert alone: what its MODEL had before it was an expert."""
        return self.composite.experts[self.active].model.get_all_wrappers(WrappersMP.PREDICT_NOISE)

    def end(self) -> None:
        """Leave guider and experts as they were."""
        for k, options in self._options.items():
            comfy.samplers.cast_to_load_options(options, device=self._patchers[k].offload_device)
        for patcher in self._patchers:
            take_away(patcher)
        self.guider.model_patcher = self.carrier

    def _name(self) -> str:
        return self.composite.plan.phases[self.active].name

    def _own_options(self, k: int) -> dict[str, Any]:
        if k not in self._options:
            patcher = self._patchers[k]
            options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
            comfy.sampler_helpers.prepare_model_patcher(patcher, self.guider.conds, options)
            comfy.samplers.cast_to_load_options(options, device=patcher.load_device, dtype=patcher.model_dtype())
            self._options[k] = options
        return self._options[k]


def compose(plan: PhasePlan, experts: Sequence[Expert], set_shift: bool = True, warnings: Sequence[str] = ()) -> Any:
    """Make one MODEL of experts, one for each phase of the plan, high noise first.

    Args:
        plan: The phase plan.
        experts: One for each phase.
        set_shift: Whether to give the MODEL the plan's shift, so that the scheduler ``simple`` with the plan's number
            of steps gives exactly the plan's sigmas.
        warnings: What is known about the experts, for the report.

    Returns:
        A MODEL for any sampler node.

    Raises:
        NodeError: If the MODELs do not fit the plan or each other.
    """
    check(plan, experts)
    model = experts[0].model.clone()
    if set_shift and plan.shift is not None:
        _set_shift(model, plan, plan.shift)
    model.wrappers.pop(WrappersMP.PREDICT_NOISE, None)  # the first expert's own: its run calls them, not all runs
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _predict_noise)
    model.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, _only_in_a_run)
    model.set_attachments(KEY, None)
    model.set_attachments(KEY, Composite(plan, experts, PatchSnapshot.of(model), warnings))
    refuse_what_needs_one_network(model, KEY, ", ".join(phase.name for phase in plan.phases))
    return model


def composite_of(model: Any) -> Composite | None:
    """Return what a MODEL carries; None when it carries no phased experts."""
    return model.get_attachment(KEY)


def check(plan: PhasePlan, experts: Sequence[Expert]) -> None:
    """Check that the MODELs fit the plan and each other.

    Args:
        plan: The phase plan.
        experts: The experts.

    Raises:
        NodeError: If they do not.
    """
    if len(experts) != len(plan):
        names = ", ".join(phase.name for phase in plan.phases)
        raise NodeError(f"the plan has {len(plan)} phase(s) ({names}), found {len(experts)} MODEL(s): connect one each")
    first = experts[0].model
    for k, expert in enumerate(experts):
        name, model = plan.phases[k].name, expert.model
        if composite_of(model) is not None:
            raise NodeError(f"the MODEL of expert {name} already carries phased experts: connect a plain MODEL")
        sampling = model.get_model_object("model_sampling")
        if not isinstance(sampling, comfy.model_sampling.CONST):
            raise NodeError(
                f"the MODEL of expert {name} is a {type(model.model).__name__}, which is not a flow matching model: "
                "phase plans are in the sigmas of flow matching (Wan, Qwen-Image, Flux, SD3 ...)"
            )
        if type(model.model) is not type(first.model) or _shapes(model) != _shapes(first):
            raise NodeError(
                f"the experts are networks of one architecture, found {_described(first)} for {plan.phases[0].name} "
                f"and {_described(model)} for {name}"
            )
        cfgs = expert.cfg if isinstance(expert.cfg, tuple) else (expert.cfg,)
        if any(cfg is not None and not 0 <= cfg <= 100 for cfg in cfgs):
            raise NodeError(f"cfg is a number from 0 to 100, found {expert.cfg} for expert {name}")


def _shapes(model: Any) -> dict[str, Any]:
    """What must be the same in all experts: not precision and device. A file's own config has lists for tuples."""
    config = model.model.model_config.unet_config
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in config.items()
        if key not in ("dtype", "device", "operations")
    }


def _described(model: Any) -> str:
    config = model.model.model_config.unet_config
    known = ("model_type", "dim", "num_layers", "in_dim", "in_channels", "hidden_size", "depth")
    return f"{type(model.model).__name__} ({', '.join(f'{key} {config[key]}' for key in known if key in config)})"


def _set_shift(model: Any, plan: PhasePlan, shift: float) -> None:
    """Set the shift as ModelSamplingSD3 and ModelSamplingAuraFlow do, but exactly for any number of steps.

    The scheduler ``simple`` picks from a table. One of a thousand entries holds no thirds, and just above a boundary
    the wrong expert would run.
    """
    sampling = model.get_model_object("model_sampling")
    multiplier = float(sampling.timestep(torch.tensor(1.0)))
    linear = float(sampling.timestep(torch.tensor(0.5))) == multiplier / 2
    if not linear or type(sampling).calculate_denoised is not comfy.model_sampling.CONST.calculate_denoised:
        return  # sampling of another kind; Phased Sigmas are exact with any
    shifted = _Sampling(model.model.model_config)
    steps = len(sampling_sigmas(plan)) - 1
    shifted.set_parameters(shift=shift, timesteps=steps * math.ceil(1000 / steps), multiplier=multiplier)
    if hasattr(sampling, "noise_scale"):
        shifted.set_noise_scale(sampling.noise_scale)
    model.add_object_patch("model_sampling", shifted)


class _Sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    pass


@in_words
def _outer_sample(
    executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *args: Any, **kw: Any
) -> Any:
    guider = executor.class_obj
    composite = composite_of(guider.model_patcher)
    if composite is None:  # the wrappers went to a MODEL of which the attachment was removed
        return executor(noise, latent_image, sampler, sigmas, *args, **kw)
    if guider.model_patcher.get_additional_models_with_key("multigpu"):
        raise NodeError("phased experts run on one GPU: take the multi-GPU node out of this MODEL")
    if getattr(guider, "uncond_model_patcher", None) is not None:
        raise NodeError(said(_ONE_MODEL))
    values = sigmas.flatten().tolist()
    warn_of_sigmas(composite.plan, values)
    run = Run(guider, composite, values)
    setattr(guider, KEY, run)
    token = _RUN.set(run)
    try:
        run.start()
        return executor(noise, latent_image, sampler, sigmas, *args, **kw)
    finally:
        _RUN.reset(token)
        delattr(guider, KEY)
        run.end()


_ONE_MODEL = (
    "this guider runs a second MODEL beside its own (DualModelGuider), and experts are switched in one MODEL only: use "
    "CFGGuider with the MODEL of phased experts, and the experts' own cfg"
)


def _only_in_a_run(patcher: Any) -> None:
    """Refuse to be run by what does not switch experts, such as a guider's second MODEL: the first would run alone."""
    run = _RUN.get()
    if composite_of(patcher) is not None and (run is None or run.carrier is not patcher):
        raise NodeError(said(_ONE_MODEL))


@in_words
def _predict_noise(
    executor: Callable[..., Any], x: Any, timestep: Any, model_options: dict[str, Any] | None = None, seed: Any = None
) -> Any:
    guider = executor.class_obj  # type: ignore[attr-defined]
    run: Run | None = getattr(guider, KEY, None)
    if run is None:
        return executor(x, timestep, model_options or {}, seed)
    run.use(float(timestep.flatten()[0]), x.shape)  # samplers work in sigma, whatever the network's timestep is
    options, cfg = run.options(model_options or {}), run.cfg()
    predict = WrapperExecutor.new_class_executor(executor, guider, run.wrappers())
    if cfg is None:
        return predict.execute(x, timestep, options, seed)
    saved, guider.cfg = guider.cfg, cfg
    try:
        return predict.execute(x, timestep, options, seed)
    finally:
        guider.cfg = saved
