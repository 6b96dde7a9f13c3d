"""Fingerprints of a base's weights, by which experts notice a base of the right architecture with other weights.

A fingerprint is a few values of one weight of each kind that the network's blocks have, spread over its depth, in
bfloat16. They are compared within what rounding does, so that the same weights agree in whatever dtype they are stored:
in one of 16 bits or more the relative error of a weight (root mean square) is at most 1.2 %, in float8 7 % (e4m3) or
13.3 % (e5m2). Packed weights (int8, 4 bits, GGUF) are passed over; the norms, biases and tables beside them are not.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .manifest import MAX_SAMPLED_VALUES, MAX_SAMPLED_WEIGHTS, BaseModel
from .untrusted import shown
from .weights import open_weights

Sampler = Callable[[str], Tensor | None]
"""A function from the name of a weight, in diffusers' naming, to what ``sample_of`` returns for it; None where it
cannot be read."""

SMALLEST = 1e-4
"""Weights whose root mean square is smaller are left out: in float16 they may vanish."""
_NUMBER = re.compile(r"\.(\d+)\.")
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Comparison:
    """The result of comparing a base's weights with a fingerprint."""

    compared: int
    """How many weights could be compared."""
    different: Mapping[str, float]
    """Names of those that differ by more than rounding does, with the relative difference."""


def take_fingerprint(names: Iterable[str], sampler: Sampler) -> dict[str, str]:
    """Take the fingerprint of a network.

    Args:
        names: The names of its weights.
        sampler: Reads samples of them.

    Returns:
        Weight name to values in base64, as manifests hold them; empty where no weight is stored in 16 bits or more.
    """
    found = {}
    for name in _one_of_each_kind(names):
        values = sampler(name)
        if values is None or not values.is_floating_point() or values.dtype.itemsize < 2 or not values.numel():
            continue
        rounded = values.to(torch.bfloat16).contiguous()
        if SMALLEST <= _size(rounded.float()) < math.inf:
            found[name] = base64.b64encode(rounded.view(torch.uint8).numpy().tobytes()).decode()
    return found


def fingerprint_of(network: nn.Module) -> dict[str, str]:
    """Take the fingerprint of a network in memory.

    Args:
        network: The network.

    Returns:
        Weight name to values in base64.
    """
    weights = network_weights(network)
    return take_fingerprint(weights, sampler_of(weights))


def compare(fingerprint: Mapping[str, str], sampler: Sampler) -> Comparison:
    """Compare a base's weights with those that a fingerprint was taken of.

    Args:
        fingerprint: Weight name to values in base64.
        sampler: Reads samples of the base's weights.

    Returns:
        How many weights were compared, and which differ.
    """
    different, compared = {}, 0
    for name, text in fingerprint.items():
        expected = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.bfloat16).float()
        values = sampler(name)
        difference = None if values is None else _difference(expected, values)
        compared += difference is not None
        if difference:
            different[name] = difference
    return Comparison(compared, different)


def base_warning(base: BaseModel, component: str, sampler: Sampler, found: str) -> str | None:
    """Write one line about a base whose network is not the one that experts were distilled from.

    Args:
        base: The base that the manifest names.
        component: The component that the network is.
        sampler: Reads samples of the network's weights.
        found: What the network is, in words, for the line.

    Returns:
        The line; None where the network is the right one, or may be.
    """
    prints = base.fingerprints or {}
    result = compare(prints.get(component, {}), sampler)
    if not result.different:
        return None
    worst = max(result.different, key=result.different.__getitem__)
    origin = f"{base.model}{f' at {base.revision}' if base.revision else ''}"
    text = (
        f"{found} has other weights than the {component} of {origin}, from which these experts were distilled: "
        f"{len(result.different)} of {result.compared} samples differ, {shown(worst)} by {result.different[worst]:.1%}"
    )
    for other, samples in prints.items():
        again = compare(samples, sampler)
        if other != component and again.compared and not again.different:
            return f"{text}; it is the {other} of that base: exchange the two networks"
    return (
        f"{text}; a fine-tune, or what was unpacked from a quantised file, may sample worse with them: compare with "
        "the base itself"
    )


# --- where weights are ------------------------------------------------------


def sample_of(weight: Tensor, start: int = 0, rows: int | None = None) -> Tensor | None:
    """Take the first values of a weight's middle row.

    Args:
        weight: A weight of any shape.
        start: The first row of the part to look at, where several weights are joined in one.
        rows: The number of rows of that part; None is all of them.

    Returns:
        The values, of shape (count,), on the CPU; None when they are elsewhere or packed.
    """
    if weight.is_meta or type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return None  # offloaded elsewhere; a tensor that consists of others
    weight = weight.detach().as_subclass(Tensor)
    if rows is not None:
        weight = weight[start : start + rows]
    row = weight[len(weight) // 2] if weight.ndim > 1 and len(weight) else weight
    return row.flatten()[:MAX_SAMPLED_VALUES].cpu()


def network_weights(network: nn.Module) -> dict[str, Tensor]:
    """List a network's weights under the names that they have without adapters and compiled parts.

    Args:
        network: The network.

    Returns:
        The weights by name.
    """
    return {
        name.replace(".base_layer.", ".").replace("_orig_mod.", ""): value for name, value in network.named_parameters()
    }


def sampler_of(weights: Mapping[str, Tensor]) -> Sampler:
    """Make a sampler of tensors in memory.

    Args:
        weights: The weights by name.

    Returns:
        The sampler.
    """
    return lambda name: sample_of(weights[name]) if name in weights else None


def sampler_of_files(files: Sequence[Path]) -> tuple[list[str], Sampler]:
    """Make a sampler of the weights in safetensors files; headers and some bytes are read.

    Args:
        files: Safetensors files.

    Returns:
        The names of the weights, and the sampler.

    Raises:
        ExpertsError: If a file is missing or not valid. The sampler raises it for a file that is unreadable by then.
    """
    weights = open_weights(*files)
    return list(weights.specs), lambda name: sample_of(weights.read(name)) if name in weights.specs else None


# --- the comparison ---------------------------------------------------------


def _one_of_each_kind(names: Iterable[str]) -> list[str]:
    """Pick one of each kind of the weights that repeat from block to block, spread over the depth of the network.

    The first kind is taken from the first block, the last kind from the last block, those between from in between.
    """
    kinds: dict[str, dict[int, str]] = {}
    for name in names:
        if match := _NUMBER.search(name):
            kind = f"{name[: match.start()]}.#.{name[match.end() :]}"
            kinds.setdefault(kind, {})[int(match[1])] = name
    repeated = sorted(kind for kind, found in kinds.items() if len(found) > 1) or sorted(kinds)
    chosen = []
    for k, kind in enumerate(repeated[:MAX_SAMPLED_WEIGHTS]):
        blocks = sorted(kinds[kind])
        chosen.append(kinds[kind][blocks[k * (len(blocks) - 1) // max(1, len(repeated) - 1)]])
    return chosen


def _difference(expected: Tensor, found: Tensor) -> float | None:
    """The relative difference where it is more than rounding to the dtype of ``found``, else 0; None without values.

    Values in float8 count up to a factor, which lies beside them in a file, and those that were in float8 once as such.
    """
    if found.shape != expected.shape or not found.is_floating_point():
        return None
    dtype, values, factor = found.dtype, found.float(), 1.0
    if dtype.itemsize < 2:
        if dtype not in _FLOAT8:
            return None
        factor = float((values @ expected) / values.square().sum().clamp(min=1e-30))
        values = values * factor
    else:
        dtype = next((kind for kind in _FLOAT8 if torch.equal(values.to(kind).float(), values)), dtype)
    step = torch.finfo(torch.bfloat16).eps  # the expected values were rounded, what is found perhaps twice
    limits = torch.finfo(dtype)
    allowed = (step + limits.eps / 2) * _size(expected) + abs(factor) * limits.smallest_normal * limits.eps / 2
    difference = _size(values - expected)
    return 0.0 if difference <= allowed else difference / _size(expected)


def _size(values: Tensor) -> float:
    """The root mean square."""
    return float(values.square().mean().sqrt())
