"""Between LoRA experts and full ones: adding a low-rank product to weights, and finding it again by SVD."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ExpertsError
from ..format.weights import Weights, progress
from ..lora.changes import Change

EXACT_SIZE = 1024
"""Matrices with a side of at most this get a full SVD, larger ones the randomised one, which takes minutes instead of
hours."""


def merged(base: Weights, changes: Mapping[str, Sequence[Change]]) -> Weights:
    """Add changes to the weights of a base, in float32; they are stored as the base is.

    Args:
        base: The base's weights.
        changes: Weight to what is added to it, such as ``alpha / rank * lora_B @ lora_A``.

    Returns:
        The merged weights, which are computed when they are read.
    """

    def read(name: str) -> Tensor:
        weight = base.read(name)
        if name not in changes:
            return weight
        for change in changes[name]:
            weight = weight.float() + change.dense()
        return weight

    return Weights(base.specs, read)


@dataclass(frozen=True)
class Extracted:
    """The LoRA closest to the difference of two networks, and what it misses."""

    lora: dict[str, Tensor]
    """``<module>.lora_A`` and ``<module>.lora_B``; their plain product is the difference (alpha = rank)."""
    errors: dict[str, float]
    """Module to relative Frobenius error ``|difference - product| / |difference|``, 0 where nothing differs."""
    left_out: dict[str, float]
    """Weights that a LoRA does not hold, and how much they differ: ``|difference| / |base|``."""
    by_rank: dict[int, list[float]]
    """Lower ranks to the relative error that each module would have at them."""

    def summary(self) -> dict[str, object]:
        """Summarise the errors for people and for the manifest.

        Returns:
            Mean and worst error, and how much was left out.
        """
        worst = max(self.errors, key=lambda module: self.errors[module])
        return {
            "relative_error_mean": sum(self.errors.values()) / len(self.errors),
            "relative_error_worst": self.errors[worst],
            "worst_module": worst,
            "relative_error_by_rank": {str(rank): sum(each) / len(each) for rank, each in self.by_rank.items()},
            "changed_weights_left_out": len(self.left_out),
            "largest_change_left_out": max(self.left_out.values(), default=0.0),
        }


def extract(
    base: Weights, expert: Weights, targets: Iterable[str], rank: int, dtype: torch.dtype, title: str
) -> Extracted:
    """Find the best LoRA of a rank for ``expert - base`` in the modules that end in one of ``targets``.

    Args:
        base: The base's weights.
        expert: The expert's weights, of the same names and shapes.
        targets: Ends of module names, as peft reads them.
        rank: The rank, at least 1.
        dtype: The dtype of the LoRA; the errors are of the weights as stored in it.
        title: The title of the progress bar.

    Returns:
        The LoRA and its errors.

    Raises:
        ExpertsError: If a module cannot have this rank, or if there is no such module.
    """
    endings = tuple(f".{target}.weight" for target in targets)
    modules = [name for name in base.specs if name.endswith(endings)]
    for name in modules:
        if rank > min(base.specs[name].shape):
            shape = "x".join(map(str, base.specs[name].shape))
            raise ExpertsError(
                f"--rank {rank} is more than {name} of {shape} has: at most {min(base.specs[name].shape)}"
            )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lower = [2**n for n in range(rank.bit_length()) if 2**n < rank]
    found = Extracted({}, {}, {}, {each: [] for each in lower})
    for name in progress(list(base.specs), title):
        before = base.read(name).to(device).float()
        difference = expert.read(name).to(device).float() - before
        size = difference.norm()
        if name in modules:
            down, up, values = factorise(difference, rank)
            down, up = down.to(dtype), up.to(dtype)
            module = name.removesuffix(".weight")
            found.lora[f"{module}.lora_A"], found.lora[f"{module}.lora_B"] = down.cpu(), up.cpu()
            rest = difference - up.float() @ down.float()
            found.errors[module] = float(rest.norm() / size) if size else 0.0
            for each, errors in found.by_rank.items():
                kept = float(values[:each].norm() / size) if size else 1.0
                errors.append(max(0.0, 1 - kept**2) ** 0.5)
        elif size:
            found.left_out[name] = float(size / before.norm()) if before.any() else float("inf")
    if not found.errors:
        raise ExpertsError(f"no module of the base ends in one of {', '.join(targets)}: nothing to extract")
    return found


def factorise(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the closest matrix of a rank, as a product ``up @ down`` (truncated SVD, in float32).

    Args:
        matrix: A matrix of shape (out, in).
        rank: The rank, at most the smaller side.

    Returns:
        down, of shape (rank, in), up, of shape (out, rank), and the largest singular values, of shape (rank,).
    """
    if min(matrix.shape) <= EXACT_SIZE:
        u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix.float(), q=min(rank + 32, *matrix.shape), niter=4)
        vh = v.mT
    root = s[:rank].sqrt()
    return (root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous(), s[:rank]


def recompressed(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Find the closest product of a lower rank to a low-rank product, exactly and without making the product.

    Args:
        down: The down-projection, of shape (old rank, in).
        up: The up-projection, of shape (out, old rank).
        rank: The new rank, at most the old one.

    Returns:
        down, of shape (rank, in), up, of shape (out, rank), and the relative Frobenius error of their product.
    """
    q_up, r_up = torch.linalg.qr(up.float())
    q_down, r_down = torch.linalg.qr(down.float().mT)
    u, s, vh = torch.linalg.svd(r_up @ r_down.mT)
    root, size = s[:rank].sqrt(), s.norm()
    error = float(s[rank:].norm() / size) if size else 0.0
    return root[:, None] * (vh[:rank] @ q_down.mT), (q_up @ u[:, :rank]) * root, error
