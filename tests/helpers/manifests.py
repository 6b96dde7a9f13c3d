"""A valid manifest, and what tests change in it."""

from __future__ import annotations

import copy
from typing import Any

VALID: dict[str, Any] = {
    "format_version": 1,
    "base": {
        "model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "architecture": "WanTransformer3DModel",
        "family": "wan",
        "revision": "main",
        "fingerprints": {"transformer": {"blocks.0.norm2.weight": "gD8AQEBA"}, "transformer_2": {"a.0.b": "gD8="}},
    },
    "plan": {
        "phases": [
            {"name": "high_noise", "sigmas": [1.0, 0.9375]},
            {"name": "low_noise", "sigmas": [0.8333333333333334, 0.625]},
        ]
    },
    "guidance_scale": 1.0,
    "experts": [
        {
            "name": "high_noise",
            "file": "high_noise.safetensors",
            "kind": "lora",
            "sha256": "0123456789abcdef" * 4,
            "component": "transformer",
            "rank": 64,
            "alpha": 8.0,
            "targets": ["attn1.to_q", "ffn.net.2"],
        },
        {
            "name": "low_noise",
            "file": "low_noise.safetensors",
            "kind": "full",
            "sha256": "f" * 64,
            "component": "transformer_2",
            "rank": None,
            "alpha": None,
            "targets": None,
        },
    ],
    "training": {"updates": 1000, "loss": 0.25, "size": [832, 480, 81]},
}
MISSING = object()


def changed(path: str, value: object) -> dict[str, Any]:
    """VALID with the entry at ``a.0.b`` replaced, added, or dropped (MISSING)."""
    data = copy.deepcopy(VALID)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    parent: Any = data
    for part in parents:
        parent = parent[part]
    if value is MISSING:
        del parent[last]
    else:
        parent[last] = value
    return data


def one_line(error: BaseException) -> str:
    """The text of an error, which is one line."""
    assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000, str(error)
    return str(error)
