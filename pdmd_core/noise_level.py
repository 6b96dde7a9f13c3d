"""Raw time, sigma and signal-to-noise ratio: three ways to say how noisy a sample is.

Sigma in [0, 1] is the coordinate of this package, where ``x_sigma = (1 - sigma) * x_0 + sigma * noise``. Raw time is
sigma before a shift is applied. (Standard library only.)
"""

from __future__ import annotations

import math


def shift_sigma(raw_time: float, shift: float) -> float:
    """Convert a raw time to sigma by a timestep shift.

    The formula is ``shift * u / (1 + (shift - 1) * u)`` for the raw time u, written so that 1 stays exactly 1. A shift
    above 1 moves steps towards noise.

    Args:
        raw_time: The raw time u, in [0, 1].
        shift: The shift, above 0; 1 changes nothing.

    Returns:
        Sigma, in [0, 1].

    Examples:
        >>> shift_sigma(0.75, 5.0)
        0.9375
        >>> shift_sigma(1.0, 5.0)
        1.0
    """
    return shift * raw_time / (shift * raw_time + (1 - raw_time))


def unshift_sigma(sigma: float, shift: float) -> float:
    """Convert sigma to a raw time, the inverse of ``shift_sigma``.

    Args:
        sigma: Sigma, in [0, 1].
        shift: The shift, above 0.

    Returns:
        The raw time, in [0, 1].
    """
    return sigma / (sigma + shift * (1 - sigma))


def signal_to_noise(sigma: float) -> float:
    """Compute the signal-to-noise ratio of ``x_sigma`` for data and noise of unit variance.

    Args:
        sigma: Sigma, in [0, 1].

    Returns:
        ``((1 - sigma) / sigma)**2``; infinite at sigma 0.
    """
    return math.inf if sigma == 0 else ((1 - sigma) / sigma) ** 2
