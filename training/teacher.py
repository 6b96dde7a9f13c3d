"""Loading the parts of a teacher pipeline, only those that are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import DiffusionPipeline

from pdmd_core.families import ModelFamily, family_of
from training.command_line import UserError

TEXT_PARTS = ("text_encoder", "tokenizer")


class TeacherError(UserError):
    """A teacher that cannot be loaded: one line."""


def load_pipeline(model: str, revision: str | None = None, **overrides: Any) -> DiffusionPipeline:
    """``DiffusionPipeline.from_pretrained`` without its progress bar. Raises TeacherError."""
    if ("/" not in model or model.startswith((".", "/"))) and not Path(model).is_dir():
        raise TeacherError(f"model.path: {model!r} is neither a folder with a diffusers pipeline nor a Hub id")
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        pipeline = DiffusionPipeline.from_pretrained(model, revision=revision, **overrides)
    except (OSError, ValueError) as error:
        raise TeacherError(
            f"model.path: cannot load a pipeline from {model!r}: {' '.join(str(error).split())}"
        ) from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_text_side(model: str, revision: str | None = None) -> DiffusionPipeline:
    """The pipeline with text encoder and tokenizer only."""
    return load_pipeline(model, revision, dtype=torch.float32, transformer=None, vae=None)


def load_image_side(model: str, revision: str | None, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline with network and autoencoder, without text encoder and tokenizer."""
    return load_pipeline(model, revision, dtype=dtype, **dict.fromkeys(TEXT_PARTS))


def move(pipeline: DiffusionPipeline, device: torch.device | str) -> DiffusionPipeline:
    """Move every loaded component to a device."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.to(device)
    return pipeline


def family_of_pipeline(pipeline: DiffusionPipeline) -> ModelFamily:
    """The model family of a loaded pipeline. Raises TeacherError."""
    try:
        return family_of(type(pipeline.transformer).__name__)
    except ValueError as error:
        raise TeacherError(f"model.path: {error}") from None
