"""What users should know of a run: a line in ComfyUI's log, and on the node that it is about."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..pdmd_core.boundary_plan import BoundaryPlan
from ..pdmd_core.phases import PhasePlan
from ..pdmd_core.sampling import sigma_warnings
from .language import said
from .runs import Run, is_trained, nearest_start
from .widget_text import Cfg

logger = logging.getLogger(__name__)

MUCH = 2.0
"""The cfg from which a few-step LoRA is likely to burn: they are distilled with guidance inside of them."""
_ON_TIME_LINE: ContextVar[bool] = ContextVar("on_time_line", default=False)
_warned: set[str] = set()
"""The nodes on which a warning stands: the front end keeps the last text of a node."""


def advice(plan: PhasePlan, sigmas: Sequence[float]) -> list[str]:
    """Say what to do about the sigmas of a run, then what is wrong with them.

    Args:
        plan: The plan of the experts.
        sigmas: The sigmas of a run, in [0, 1].

    Returns:
        Sentences, what to do first; an empty list when all is well.
    """
    warnings = sigma_warnings(plan, sigmas)
    if not warnings or len(sigmas) < 2 or isinstance(plan, BoundaryPlan):
        return warnings
    steps, trained = len(sigmas) - 1, len(plan.sigmas)
    if steps != trained and sigmas[0] >= 1:
        first = f"{steps} steps, trained for {trained}: use {trained} and scheduler simple (0 on Phased Sampler)"
    elif sigmas[0] < 1 and not is_trained(plan, sigmas[0]):
        near = nearest_start(plan, sigmas[0])
        first = f"take denoise {near:.3g} to start at a trained step: sigma {sigmas[0]:.4g} lies between two"
    else:
        first = "not the trained sigmas: use scheduler simple with set_shift on, or Phased Sigmas"
    return [first, *warnings]


def note_of(
    plan: PhasePlan, run: Run, cfgs: Sequence[Cfg], strengths: Sequence[float | None] | None = None
) -> str | None:
    """Say on a time line what to do about a run of Phased Sampler, in few words.

    Args:
        plan: The plan of the experts.
        run: The run.
        cfgs: The cfg of each phase.
        strengths: The strength of the LoRA of each phase whose guidance is not known; None for no such LoRA, and for
            all.

    Returns:
        The words; None when all is well.
    """
    if isinstance(plan, BoundaryPlan):
        return None
    if all(is_trained(plan, sigma) for sigma in run.sigmas[:-1]):
        pairs = zip(cfgs, strengths or [None] * len(plan), strict=True)
        guided = [cfg for cfg, strength in pairs if strength and isinstance(cfg, float) and cfg >= MUCH]
        return f"cfg {max(guided):g} with few-step LoRAs: most of them want 1" if guided else None
    if run.start is not None and not is_trained(plan, run.sigmas[0]):
        return f"denoise {run.start:.3g} is between trained steps, {nearest_start(plan, run.sigmas[0]):.3g} is at one"
    return f"{len(run.skipped) + len(run.sigmas) - 1} steps, trained for {len(plan.sigmas)}: set steps to 0"


def warn_of_sigmas(plan: PhasePlan, sigmas: Sequence[float]) -> None:
    """Warn when a run does not take the sigmas of the plan, on the node with what to do; say so when it does again."""
    warnings = advice(plan, sigmas)
    if warnings:
        more = (
            f" ({warnings[1]}{f'; and {len(warnings) - 2} more' if len(warnings) > 2 else ''})" if warnings[1:] else ""
        )
        logger.warning(f"Phased experts: {warnings[0]}{more}")
    if not _ON_TIME_LINE.get():
        _show(warnings[:1] or ["these are trained sigmas"], warning=bool(warnings))


@contextmanager
def on_time_line() -> Iterator[None]:
    """Let the run inside warn of its sigmas in the log alone: the node's time line has the note."""
    token = _ON_TIME_LINE.set(True)
    try:
        yield
    finally:
        _ON_TIME_LINE.reset(token)


def say_where_it_starts(denoise: float, run: Run) -> None:
    """Say in the log at which step a run with a denoise below 1 starts."""
    if run.start is not None:
        total = len(run.skipped) + len(run.sigmas) - 1
        logger.info(
            f"Phased experts: denoise {denoise:g} starts at {run.start:.3g}, step {len(run.skipped) + 1} of {total}, "
            f"sigma {run.sigmas[0]:.4g}"
        )


def warn_of_base(warnings: Sequence[str]) -> None:
    """Warn, in one line each, of bases whose weights are not those that experts were distilled from."""
    for text in warnings:
        logger.warning(f"Phased experts: {text}")
    _show(warnings or ["on their own base"], warning=bool(warnings))


def warn_of_loras(warnings: Sequence[str], misplaced: Sequence[str] = ()) -> None:
    """Warn, in one line each, of keys of LoRA files that have no place in their base, and of files in wrong slots.

    Args:
        warnings: What the node says.
        misplaced: What its time line says already.
    """
    for text in [*misplaced, *warnings]:
        logger.warning(f"Phased experts: {text}")
    _show(warnings or ["every key of the LoRAs has its place"], warning=bool(warnings))


def _show(sentences: Sequence[str], warning: bool) -> None:
    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if context is None or server is None:
        return
    if warning or context.node_id in _warned:
        text = "; ".join(said(sentence) for sentence in sentences)
        server.send_progress_text(text, context.node_id, server.client_id)
    (_warned.add if warning else _warned.discard)(context.node_id)
