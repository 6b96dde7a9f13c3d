"""Keys of the configuration that have another name now, and configurations of older runs under today's names."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

MOVED = {
    "prompts": "data.prompts",
    "negative_prompt": "data.negative_prompt",
    "cache_dir": "data.cache_dir",
    "generator.component": "generator.components",
    "sharding": "parallel.sharding",
    "shard_size": "parallel.shard_size",
    "context_parallel": "parallel.context_parallel",
    "micro_batch_size": "memory.micro_batch_size",
    "gradient_checkpointing": "memory.gradient_checkpointing",
    "guidance_batched": "memory.guidance_batched",
    "offload_idle_network": "memory.offload_idle_network",
    "offload_idle_experts": "memory.offload_idle_experts",
    "checkpoint_every": "checkpoints.every",
    "keep_checkpoints": "checkpoints.keep",
    "sample_every": "validation.every",
    "sample_prompts": "validation.prompts",
    "sample_seeds": "validation.seeds",
    "tracker": "monitoring.tracker",
    "log_every": "monitoring.log_every",
    "watch.page": "monitoring.page",
    "watch.window": "monitoring.window",
    "watch.diversity_fall": "monitoring.diversity_fall",
    "watch.saturation_rise": "monitoring.saturation_rise",
    "watch.fake_loss_rise": "monitoring.fake_loss_rise",
    "watch.grad_norm_rise": "monitoring.grad_norm_rise",
    "watch.smallest_motion": "monitoring.smallest_drift",
    "watch.share_of_time": "monitoring.share_of_time",
    "watch": "monitoring",
    "expert_dtype": "export.dtype",
}
"""Old key to new one; keys of a section come before the section."""

GONE = {"objective.expert_start": "teacher"}
"""Keys that are no more, with the value that is the only one left: runs that had it are runs of today."""


def moved_keys(data: Mapping[str, Any]) -> list[str]:
    """What the old keys in a configuration are called now.

    Args:
        data: Keys and values; sections are mappings.

    Returns:
        A line for each old key.
    """
    left, lines = copy.deepcopy(dict(data)), []
    for old, new in MOVED.items():
        if _pop(left, old) is not None:
            lines.append(f"{old} is {new} now")
    return lines


def with_todays_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an older run under today's keys.

    Args:
        data: Keys and values; sections are mappings. It stays as it is.

    Returns:
        The same values under today's keys; of a run of today, an equal configuration.
    """
    result = copy.deepcopy(dict(data))
    for old, new in MOVED.items():
        found = _pop(result, old)
        if found is None:
            continue
        (value,) = found
        if old == "generator.component":  # was one name
            value = None if value is None else [value]
        section, _, name = new.partition(".")
        if name:
            result.setdefault(section, {}).setdefault(name, value)
    for old, value in GONE.items():
        section, _, name = old.partition(".")
        place = result.get(section)
        if isinstance(place, dict) and place.get(name) == value:
            _pop(result, old)
    return result


def _pop(data: dict[str, Any], key: str) -> tuple[Any] | None:
    """Take the value of a dotted key out, and its section with it where that is empty then; None without the key."""
    section, _, name = key.rpartition(".")
    place = data.get(section) if section else data
    if not isinstance(place, dict) or name not in place:
        return None
    value = place.pop(name)
    if section and not place:
        del data[section]
    return (value,)
