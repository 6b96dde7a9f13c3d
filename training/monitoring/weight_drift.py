"""How far weights moved since training began: seen in a sample of them, which costs nothing at any size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SAMPLED = 4096
"""Weights of each tensor that are compared, evenly spaced."""


class WeightDrift:
    """Of these parameters, since this object was made."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.start = [_sample(parameter) for parameter in self.parameters]

    def measure(self) -> tuple[float, float]:
        """Root mean square of the way relative to that of the weights, and the share of weights that changed."""
        moved = weights = 0.0
        changed = total = 0
        for parameter, start in zip(self.parameters, self.start, strict=True):
            now = _sample(parameter)
            way = now.double() - start.double()
            moved += float(way.square().sum())
            weights += float(torch.maximum(now.double().square(), start.double().square()).sum())
            changed += int((now != start).sum())
            total += now.numel()
        return (moved / weights) ** 0.5 if weights else 0.0, changed / max(total, 1)


def _sample(parameter: Tensor) -> Tensor:
    own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    flat = own.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].cpu().clone()
