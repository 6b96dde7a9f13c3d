"""What users should know of a run: a line in ComfyUI's log, and on the node that it is about."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..pdmd_core.phases import PhasePlan
from ..pdmd_core.sampling import sigma_warnings

logger = logging.getLogger(__name__)

_warned: set[str] = set()
"""The nodes on which a warning stands: the front end keeps the last text of a node."""


def warn_of_sigmas(plan: PhasePlan, sigmas: Sequence[float]) -> None:
    """Warn, in one line, when a run does not take the sigmas of the plan; say so when it does again."""
    warnings = sigma_warnings(plan, sigmas)
    if warnings:
        more = f"; and {len(warnings) - 1} more, all in Phase Plan Report" if len(warnings) > 1 else ""
        steps = f"{max(len(sigmas) - 1, 0)} step(s) here, {len(plan.sigmas)} trained"
        line = f"Phased experts: {warnings[0]}{more}. {steps}: Phased Sigmas has the trained ones"
        logger.warning(line)
        _show(line, warning=True)
    else:
        _show("Phased experts: these are trained sigmas", warning=False)


def warn_of_base(warnings: Sequence[str]) -> None:
    """Warn, in one line each, of bases whose weights are not those that experts were distilled from."""
    for text in warnings:
        logger.warning(f"Phased experts: {text}")
    _show(f"Phased experts: {'; '.join(warnings) or 'on their own base'}", warning=bool(warnings))


def warn_of_loras(warnings: Sequence[str]) -> None:
    """Warn, in one line each, of keys of LoRA files that have no place in their base."""
    for text in warnings:
        logger.warning(f"Phased experts: {text}")
    _show(f"Phased experts: {'; '.join(warnings) or 'every key of the LoRAs has its place'}", warning=bool(warnings))


def _show(text: str, warning: bool) -> None:
    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if context is None or server is None:
        return
    if warning or context.node_id in _warned:
        server.send_progress_text(text, context.node_id, server.client_id)
    (_warned.add if warning else _warned.discard)(context.node_id)
