"""What all nodes share: their category, the socket of plans, schemas that older versions of ComfyUI take, too."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from .bypass import LORA_WEIGHTS

CATEGORY = "phased dmd"
"""The place of the nodes in ComfyUI's menu."""
Plan = io.Custom("PHASE_PLAN")
"""The socket type of phase plans."""


def schema(node_id: str, **values: Any) -> io.Schema:
    """Make an ``io.Schema`` in our category, without the fields that this version of ComfyUI does not have yet."""
    known = {field.name for field in fields(io.Schema)}
    return io.Schema(
        node_id=node_id, category=CATEGORY, **{key: value for key, value in values.items() if key in known}
    )


def plan_input(**values: Any) -> Any:
    """Declare the socket of a plan."""
    return Plan.Input(
        "plan", tooltip="Which expert runs at which sigma; from a Phase Plan or Load Phased Experts node.", **values
    )


def text_input(name: str, **values: Any) -> Any:
    """Declare a widget of text whose socket takes a number, or a list of numbers, of another node as well."""
    return io.MultiType.Input(io.String.Input(name, **values), types=[io.Float, io.Int])


def cfg_input(default: str = "") -> Any:
    """Declare the widget whose text ``widget_text.read_cfgs`` reads."""
    trained = " trained: the guidance that the experts were distilled for." if default else ""
    return text_input(
        "cfg",
        default=default,
        tooltip=f"Guidance of each expert, in the place of the sampler's cfg.{trained} Empty: the sampler's for all. "
        "3.5, 1, 1: one number for each phase; - is the sampler's. 3.5, 2 | 1, 1: one for each step, | between phases. "
        "Takes a number or a list of another node, too.",
    )


def strengths_input(name: str, what: str, factor: str) -> Any:
    """Declare the widget whose text ``widget_text.read_strengths`` reads."""
    return text_input(
        name,
        default="",
        optional=True,
        tooltip=f"Strength of each {what} with commas between (1.1, 0.8), by which {factor} is multiplied; with | one "
        "for each step (1.1, 0.9 | 0.8, 0.8). Empty: 1 for all. Takes a number or a list of another node, too.",
    )


def shift_input() -> Any:
    """Declare the switch that says whether a MODEL gets the plan's shift."""
    return io.Boolean.Input(
        "set_shift",
        default=True,
        tooltip="Give the MODEL the plan's shift: then any sampler with scheduler 'simple' and the plan's number of "
        "steps takes exactly the trained sigmas. Switch off to set a shift yourself.",
    )


def lora_weights_input() -> Any:
    """Declare the choice of where the weights of LoRA experts are."""
    return io.Combo.Input(
        "lora_weights",
        options=LORA_WEIGHTS,
        default=LORA_WEIGHTS[0],
        optional=True,
        tooltip="merged: part of the base's weights, which ComfyUI prepares anew at each switch; each step costs what "
        "the base does. beside: computed beside them, so that a switch moves the LoRA alone and each step costs a "
        "little more; for large bases on fast steps (pictures).",
    )
