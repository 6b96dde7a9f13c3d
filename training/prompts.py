"""Training prompts and their embeddings.

Prompts come from a text file, one a line. Embeddings are computed once, kept on disk by the content they depend on, and
the text encoder is gone from memory before training starts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from pdmd_core.families import ModelFamily
from training.command_line import UserError
from training.teacher import load_text_side, move


class PromptError(UserError):
    """A prompt file that cannot be used: one line."""


def read_prompts(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, stripped, without empty ones and without lines that start with #."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PromptError(f"{path}: no such prompt file; expected a text file with one prompt a line") from None
    except IsADirectoryError:
        raise PromptError(f"{path}: is a folder; expected a text file with one prompt a line") from None
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    prompts = [line.strip() for line in text.splitlines()]
    prompts = [line for line in prompts if line and not line.startswith("#")]
    if not prompts:
        raise PromptError(f"{path}: no prompts in it; expected one prompt a line")
    return prompts


@dataclass(frozen=True)
class PromptBank:
    """Embeddings of all prompts and of the negative prompt: conditioning tensors, first axis = prompt."""

    prompts: list[str]
    embeddings: dict[str, Tensor]
    negative: dict[str, Tensor]

    def conditioning(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        """Conditioning of these prompts (batch,) on a device."""
        return {name: value[indices].to(device) for name, value in self.embeddings.items()}

    def negative_conditioning(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """The negative prompt's conditioning, repeated over a batch."""
        return {name: value.expand(batch, *value.shape[1:]).to(device) for name, value in self.negative.items()}


def encode_prompts(
    prompts: Sequence[str],
    negative_prompt: str,
    model: str,
    revision: str | None,
    family: ModelFamily,
    max_sequence_length: int,
    cache_dir: Path,
    device: torch.device | str = "cpu",
    batch: int = 64,
) -> PromptBank:
    """Embed the prompts with the teacher's text encoder, or read what an earlier run left in ``cache_dir``."""
    identity = json.dumps([list(prompts), negative_prompt, _model_identity(model), revision, max_sequence_length])
    path = cache_dir / f"prompts-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.safetensors"
    if not path.exists():
        pipeline = move(load_text_side(model, revision), device)
        texts = [*prompts, negative_prompt]
        parts = [
            family.encode_prompts(pipeline, texts[i : i + batch], max_sequence_length)
            for i in tqdm(range(0, len(texts), batch), desc="embed prompts", disable=len(texts) < 10 * batch)
        ]
        tensors = {name: torch.cat([part[name].cpu() for part in parts]).contiguous() for name in parts[0]}
        cache_dir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.part")
        save_file(tensors, temporary)
        temporary.replace(path)
    tensors = load_file(path)
    return PromptBank(
        list(prompts),
        {name: value[:-1] for name, value in tensors.items()},
        {name: value[-1:] for name, value in tensors.items()},
    )


def _model_identity(model: str) -> str:
    """A local folder is identified by its text encoder's weights, not by where it lies."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    files = sorted((folder / "text_encoder").glob("*")) + sorted((folder / "tokenizer").glob("*"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
