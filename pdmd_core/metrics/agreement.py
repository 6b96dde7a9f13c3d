"""Prompt agreement: does a classifier see what the prompt said."""

from __future__ import annotations

from torch import Tensor

from .intervals import Estimate, share


def prompt_agreement(seen: Tensor, wanted: Tensor) -> Estimate:
    """Share of samples in which every wanted class was seen, with a 95 % Wilson interval.

    seen:   class indices that a classifier gave, shape (samples,) or (samples, attributes): subject, background ...
    wanted: what the prompt says, of the same shape; a negative index is an attribute that the prompt leaves open.

    Raises ValueError for other shapes and when no prompt says anything.
    """
    if seen.shape != wanted.shape or seen.ndim not in (1, 2):
        raise ValueError(
            f"expected classes of shape (samples,) or (samples, attributes), found {tuple(seen.shape)} seen and "
            f"{tuple(wanted.shape)} wanted"
        )
    seen, wanted = seen.reshape(len(seen), -1), wanted.reshape(len(wanted), -1)
    says = (wanted >= 0).any(1)
    if not bool(says.any()):
        raise ValueError("no prompt names a class that the classifier knows: there is nothing to agree with")
    return share(((seen == wanted) | (wanted < 0)).all(1)[says])
