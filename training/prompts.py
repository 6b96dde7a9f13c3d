"""A few examples of one size: what sampling and evaluation ask of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pdmd_core.families import ModelFamily
from training.data.bank import PromptBank, prompt_bank
from training.data.buckets import Bucket
from training.data.encoder import Encoder
from training.data.examples import Example, PromptError, read_examples, read_prompts
from training.teacher import TeacherSource

__all__ = ["Example", "PromptBank", "PromptError", "SampleSize", "encode_examples", "read_examples", "read_prompts"]


@dataclass(frozen=True)
class SampleSize:
    """Pixels, frames and the length to which prompts are padded."""

    height: int
    width: int
    frames: int
    max_sequence_length: int


def encode_examples(
    examples: Sequence[Example],
    negative_prompt: str,
    source: TeacherSource,
    family: ModelFamily,
    size: SampleSize,
    cache_dir: Path,
    device: torch.device | str = "cpu",
) -> PromptBank:
    """Conditioning of a few examples that are all of one size; ``cache_dir`` may go afterwards. Raises PromptError."""
    encoder = Encoder(source, family, size.max_sequence_length, device)
    bucket = Bucket(size.width, size.height, size.frames)
    return prompt_bank(examples, negative_prompt, encoder, [bucket], cache_dir).in_memory()
