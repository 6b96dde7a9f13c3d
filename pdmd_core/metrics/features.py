"""What the measures require of features."""

from __future__ import annotations

from torch import Tensor


def check_pair(first: Tensor, second: Tensor, at_least: int = 2) -> None:
    """Check that two sets of features can be compared.

    Args:
        first: Features of shape (samples, dimensions).
        second: Features of shape (samples, dimensions); the number of samples may differ.
        at_least: The least number of samples in each set.

    Raises:
        ValueError: If a set has another shape, too few samples or values that are not finite, or if the dimensions
            differ.
    """
    for name, features in (("first", first), ("second", second)):
        if features.ndim != 2 or len(features) < at_least:
            raise ValueError(
                f"the {name} features have shape (samples >= {at_least}, dimensions), found {tuple(features.shape)}"
            )
        if not bool(features.isfinite().all()):
            raise ValueError(f"the {name} features have values that are not finite")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"both sets have the same dimensions, found {first.shape[1]} and {second.shape[1]}")
