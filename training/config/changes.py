"""What may differ between a run and its resumption: what changes no number, and what was asked for by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.config.keys import fields_of, suggestion
from training.config.problems import leaves_of
from training.config.schema import ConfigError, DistillConfig, with_defaults

FREE = (
    "output_dir",
    "compile",
    "attention",
    "max_bad_updates",
    "model.path",
    "model.revision",
    "model.experts",
    "model.architecture",
    "data.prompts",
    "start.experts",
    "data.cache_dir",
    "parallel.",
    "memory.",
    "checkpoints.",
    "validation.",
    "monitoring.",
    "export.",
)
"""Keys, or starts of keys, that may always differ: they change no number, or only how sums are rounded. Where the
teacher and the prompts lie may differ, what they are may not, which is compared by content."""

ON_REQUEST = (
    "updates",
    "batch_size",
    "fake_updates",
    "draws_per_rollout",
    "score_groups",
    "lr_decay_share",
    "ema_decay",
    "ema_warm_up",
    "precision",
    "objective.",
    *(f"{role}.{name}" for role in ("generator", "fake") for name in ("lr", "betas", "weight_decay", "max_grad_norm")),
)
"""Keys, or starts of keys, that may differ when they are named: numbers change from there on, and what was trained
still fits."""


NEVER = ("objective.fake_rollouts",)
"""Keys below those that may not: they say which networks there are."""


@dataclass(frozen=True)
class Changes:
    """What differs, each as ``generator.lr: 0.001 -> 0.0005``.

    Attributes:
        free: What may always differ.
        requested: What was asked for by name.
    """

    free: list[str]
    requested: list[str]


def changes_since(before: Mapping[str, Any], config: DistillConfig, allowed: Sequence[str] = ()) -> Changes:
    """Compare a configuration with that of a checkpoint.

    Args:
        before: The checkpoint's, as plain data, also that of an older run.
        config: The one of today.
        allowed: Keys that were named as ones that may change.

    Returns:
        What differs and may.

    Raises:
        ConfigError: A run of ``before`` cannot go on with this; every refused key is named.
    """
    check_allowed(allowed)
    then, now = _flat(with_defaults(before)), _flat(json.loads(config.model_dump_json()))
    changed = {
        key: f"{key}: {then.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(set(then) | set(now))
        if then.get(key) != now.get(key) and not _same_updates(key, then, now, len(config.plan.build()))
    }
    free = [text for key, text in changed.items() if key.startswith(FREE)]
    requested = [text for key, text in changed.items() if not key.startswith(FREE) and key in allowed]
    refused = {key: text for key, text in changed.items() if not key.startswith(FREE) and key not in allowed}
    if then.get("ema_decay") != now.get("ema_decay") and None in (then.get("ema_decay"), now.get("ema_decay")):
        refused["ema_decay"] = f"{changed['ema_decay']} (an average cannot begin or end in the middle)"
    if refused:
        could = [key for key in refused if _on_request(key) and key not in allowed]
        ask = f", allow it with {' '.join(f'--allow-change {key}' for key in could)}," if could else ""
        raise ConfigError(
            f"the configuration changed since the checkpoint, so the run cannot be resumed; set it back{ask} or choose "
            f"another output_dir. Changed: {'; '.join(refused.values())}"
        )
    return Changes(free, requested)


def check_allowed(keys: Sequence[str]) -> None:
    """Check the keys of ``--allow-change``.

    Args:
        keys: Dotted keys.

    Raises:
        ConfigError: There is no such key, or what was trained would not fit another value.
    """
    known = [key for key, _, _ in fields_of(DistillConfig)]
    for key in keys:
        if key not in known:
            raise ConfigError(f"--allow-change {key}: unknown key {key!r}, {suggestion(key, known)}")
        if key.startswith(FREE):
            raise ConfigError(f"--allow-change {key}: it may always change, leave it out")
        if not _on_request(key):
            raise ConfigError(
                f"--allow-change {key}: what was trained does not fit another value; start another run in another "
                "output_dir"
            )


def _on_request(key: str) -> bool:
    return key.startswith(ON_REQUEST) and key not in NEVER


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys and values; lists of sections too, as ``data.buckets[0].width``."""
    found: dict[str, Any] = {}
    for key, value in leaves_of(data).items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for number, item in enumerate(value):
                found |= _flat({f"{key}[{number}]": item})
        else:
            found[key] = value
    return found


def _same_updates(key: str, then: Mapping[str, Any], now: Mapping[str, Any], phases: int) -> bool:
    """One number for all phases is the same as a list of it."""
    each = [value if isinstance(value, list) else [value] * phases for value in (then.get(key), now.get(key))]
    return key == "updates" and each[0] == each[1]
