"""What a pipeline is made of, to see that nothing of it changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what diffusers notes down itself, when it saves, say."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def state_of(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Everything about a pipeline that attaching could change."""
    found: dict[str, Any] = {"class": type(pipe), "config": public(pipe.config), "attributes": set(pipe.__dict__)}
    for name, component in pipe.components.items():
        found[name] = component
        if isinstance(component, nn.Module):
            found[f"{name} modules"] = [(n, type(m), m._forward_pre_hooks) for n, m in component.named_modules()]
            found[f"{name} weights"] = {k: (v, v.clone()) for k, v in component.state_dict(keep_vars=True).items()}
            found[f"{name} attributes"] = {k: v for k, v in component.__dict__.items() if k.startswith(("peft", "_hf"))}
    return found


def assert_same(pipe: DiffusionPipeline, before: dict[str, Any]) -> None:
    after = state_of(pipe)
    assert after.keys() == before.keys()
    for name, value in before.items():
        if name.endswith("weights"):
            assert after[name].keys() == value.keys()
            for key, (tensor, copy) in value.items():
                assert after[name][key][0] is tensor and torch.equal(tensor, copy)
        elif name in pipe.components:
            assert after[name] is value
        else:
            assert after[name] == value
