"""What the measures ask of features."""

from __future__ import annotations

from torch import Tensor


def check_pair(first: Tensor, second: Tensor, at_least: int = 2) -> None:
    """Raises ValueError unless both are finite features (samples, dimensions) that can be compared."""
    for name, features in (("first", first), ("second", second)):
        if features.ndim != 2 or len(features) < at_least:
            raise ValueError(
                f"the {name} features have shape (samples >= {at_least}, dimensions), found {tuple(features.shape)}"
            )
        if not bool(features.isfinite().all()):
            raise ValueError(f"the {name} features have values that are not finite")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"both sets have the same dimensions, found {first.shape[1]} and {second.shape[1]}")
