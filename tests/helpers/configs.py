"""Configurations that differ from another one in a few keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.config.schema import DistillConfig, parse_config, with_values


def changed(config: DistillConfig | Mapping[str, Any], **values: Any) -> DistillConfig:
    """The configuration with these values of (dotted) keys."""
    data = config.model_dump(mode="json") if isinstance(config, DistillConfig) else config
    return parse_config(with_values(data, values), "test")
