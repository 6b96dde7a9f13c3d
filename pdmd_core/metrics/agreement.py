"""Prompt agreement: whether a classifier sees in a sample what its prompt says."""

from __future__ import annotations

from torch import Tensor

from .intervals import Estimate, share


def prompt_agreement(seen: Tensor, wanted: Tensor) -> Estimate:
    """Measure the share of samples in which every wanted class was seen, with a 95 % Wilson interval.

    Args:
        seen: Class indices that a classifier gave, of shape (samples,) or (samples, attributes), where an attribute is
            the subject, the background and so on.
        wanted: Class indices that the prompts ask for, of the same shape. A negative index is an attribute that the
            prompt leaves open.

    Returns:
        The share, in [0, 1], over the samples whose prompt asks for at least one class.

    Raises:
        ValueError: If the shapes are others, or if no prompt asks for any class.

    Examples:
        >>> import torch
        >>> seen = torch.tensor([[3, 0], [3, 1], [5, 1], [2, 1]])
        >>> wanted = torch.tensor([[3, 0], [3, 0], [5, -1], [2, 1]])
        >>> prompt_agreement(seen, wanted).value
        0.75
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
