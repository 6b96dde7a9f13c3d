"""Noise levels for tests with Gaussians, and the coefficients between two of them."""

from __future__ import annotations

import math

import torch

from pdmd_core.objectives import RenoisedSamples

F64 = torch.float64
LEVELS = [(0.0, 0.3), (0.0, 0.9), (0.5, 0.51), (0.5, 0.8), (0.8333, 0.9), (0.9, 0.99)]
"""Pairs s < t."""


def coefficients(s: float, t: float) -> tuple[float, float]:
    """Scale and standard deviation of x_t given x_s, by definition."""
    a = (1 - t) / (1 - s)
    return a, math.sqrt(t**2 - a**2 * s**2)


def at(x_t, s, t):
    """Samples that are ``x_t`` once they are renoised from s to t."""
    samples = RenoisedSamples(x_t, torch.zeros_like(x_t), s, t)
    samples.__dict__["x_t"] = x_t
    return samples
