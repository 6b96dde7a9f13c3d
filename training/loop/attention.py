"""Which implementation computes attention: the asked one where it can run backwards here, the native one otherwise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor, nn

from training.config.sections import Attention

_NAMES = {"native": "native", "cudnn": "_native_cudnn", "flash": "flash"}
"""How diffusers calls them."""
NORMS = {"norm_q", "norm_k", "norm_added_q", "norm_added_k"}


def set_attention(
    networks: Iterable[Any], wanted: Attention, device: torch.device, dtype: torch.dtype, say: Callable[[str], None]
) -> Attention:
    """Make diffusers networks compute attention so, and say how.

    Args:
        networks: The networks.
        wanted: What is asked for.
        device: Where they compute.
        dtype: In what they compute.
        say: Is told what computes attention, in a line.

    Returns:
        What computes it: ``native`` where the asked one does not run forwards and backwards here.
    """
    found, why = wanted, ""
    if wanted != "native" and (problem := _problem(wanted, device, dtype)):
        found, why = "native", f": {wanted} does not run here ({problem})"
    say(f"attention: {found}{why}")
    if found == "native":
        return found
    for network in networks:
        with _quiet():
            network.set_attention_backend(_NAMES[found])
        for module in network.modules():
            for name in NORMS & set(dict(module.named_children())):
                module.get_submodule(name).register_forward_hook(as_attention_computes)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' warning that backends are new."""
    log = logging.getLogger("diffusers.models.modeling_utils")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def as_attention_computes(norm: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """Queries and keys in autocast's dtype, which values have: only torch's own attention casts them itself."""
    device = output.device.type
    return output.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else output


def _problem(wanted: Attention, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a small attention does not run forwards and backwards; None where it does."""
    try:
        query = torch.randn(1, 128, 2, 128, device=device, dtype=dtype, requires_grad=True)
        output = dispatch_attention_fn(query, query, query, backend=AttentionBackendName(_NAMES[wanted]))
        output.float().square().mean().backward()
        if query.grad is None or not bool(query.grad.isfinite().all()):
            return "its gradient is not finite"
    except Exception as error:  # of a library that is missing, of a kernel, of a device
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return None
