"""Tiny random pipelines of every class of diffusers, from the sizes in ``sizes.json``.

The sizes, and the arguments of a small call, are mostly those of diffusers' own tests of its pipelines (Apache-2.0).
They go into the real classes.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.models.transformers import transformer_cosmos
from diffusers.pipelines.omnigen import pipeline_omnigen
from torch import nn
from torch.nn import functional
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.models.t5gemma import modeling_t5gemma

from tests.helpers.families.parts import picture, quiet, qwen_tokenizer, spread
from tests.helpers.families.qwen_image import picture_processor
from tests.helpers.tiny import randn, tokenizer

SIZES: dict[str, Any] = json.loads(Path(__file__).with_name("sizes.json").read_text(encoding="utf-8"))
"""Class of a pipeline to its components and its call."""

_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def classes() -> list[str]:
    """Names of all pipelines of the installed diffusers that have a transformer."""
    found = {name: getattr(diffusers, name, None) for name in dir(diffusers) if "Pipeline" in name}
    return [
        name
        for name, kind in sorted(found.items())
        if isinstance(kind, type)
        and issubclass(kind, DiffusionPipeline)
        and "transformer" in inspect.signature(kind.__init__).parameters
    ]


def stand_in_for_torchvision() -> None:
    """What pipelines of Cosmos and OmniGen take from torchvision, which the tests do without."""
    resize = SimpleNamespace(resize=lambda x, size, **_: functional.interpolate(x, size))
    for module in (transformer_cosmos, controlnet_cosmos):
        if not hasattr(module, "transforms"):
            module.transforms = SimpleNamespace(functional=resize, InterpolationMode=SimpleNamespace(NEAREST=0))
    if not hasattr(pipeline_omnigen, "OmniGenMultiModalProcessor"):
        pipeline_omnigen.OmniGenMultiModalProcessor = lambda *_, **__: None


class NothingUnsafe(nn.Module):
    """In the place of Cosmos' safety checker, whose weights are 40 GB."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def build(name: str) -> Any:
    """A pipeline of a class; equal weights every time."""
    stand_in_for_torchvision()
    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    parts = {n: _component(n, v) for n, v in SIZES[name]["components"].items() if n in known}
    return quiet(kind(**parts))


def _component(name: str, size: Any) -> Any:
    torch.manual_seed(0)
    match size:
        case None:
            return None
        case {"value": value}:
            return value
        case {"tokenizer": "bytes"}:
            return tokenizer()
        case {"tokenizer": "qwen"}:
            return qwen_tokenizer()
        case {"tokenizer": _}:
            return picture_processor()
        case {"safety": _}:
            return NothingUnsafe()
        case {"processor": settings, "transformers": kind}:
            known = {"CLIPImageProcessorPil": CLIPImageProcessorPil, "SiglipImageProcessorPil": SiglipImageProcessorPil}
            return known[kind](**settings) if kind in known else getattr(transformers, kind)()
        case {"transformers": kind, "config": config}:
            made = getattr(transformers, kind, None) or getattr(modeling_t5gemma, kind)
            if kind.startswith(("Qwen2_5_VLFor", "Qwen3VLFor")):
                config = config | {key: qwen_tokenizer().convert_tokens_to_ids(token) for key, token in _TOKENS.items()}
            return made(made.config_class(**config)).eval()
        case {"diffusers": kind, "config": config}:
            made = getattr(diffusers, kind, None) or getattr(diffusers.pipelines.ltx2, kind)
            component = made(**_with_tuples(made, config))
            if name == "controlnet":
                spread(component, 0.1)  # at first it has no effect
            return component.eval() if isinstance(component, nn.Module) else component
    raise AssertionError(f"{name}: {size}")


def _with_tuples(kind: type[Any], config: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists alone."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(kind.__init__).parameters.items()}
    return {k: tuple(v) if isinstance(v, list) and isinstance(defaults.get(k), tuple) else v for k, v in config.items()}


def call_of(name: str) -> dict[str, Any]:
    """Arguments of a small call, with a generator of its own; guidance and steps as the pipeline has them."""
    call = {key: _argument(value) for key, value in SIZES[name]["call"].items()}
    known = inspect.signature(getattr(diffusers, name).__call__).parameters
    call |= {"generator": torch.Generator().manual_seed(7), "return_dict": False}
    call.setdefault("output_type", "latent")
    return {key: value for key, value in call.items() if key in known}


def _argument(value: Any) -> Any:
    match value:
        case {"picture": [width, height, mode]}:
            return picture(size=(40, 24)).resize((width, height)).convert(mode)
        case {"tensor": shape, "dtype": dtype, "min": low, "max": high}:
            kind = getattr(torch, dtype.removeprefix("torch."))
            if kind in (torch.float32, torch.float16, torch.bfloat16):
                return (randn(*shape).sigmoid() * (high - low) + low).to(kind)
            return torch.full(shape, int(high)).to(kind)
        case {"array": shape, "dtype": dtype}:
            return (randn(*shape).sigmoid().numpy() * (255 if dtype == "uint8" else 1)).astype(np.dtype(dtype))
        case {"dict": entries}:
            return {key: _argument(entry) for key, entry in entries.items()}
        case list():
            return [_argument(entry) for entry in value]
    return value
