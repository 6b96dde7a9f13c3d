"""What identifies encoded prompts: the examples and the bytes of what encodes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from pdmd_core.hashing import sha256_of, sha256_of_bytes
from training.data.buckets import Bucket, bucket_of
from training.data.encoder import Encoder
from training.data.examples import Example
from training.data.teacher import IMAGE_PARTS, TeacherSource

CHUNK = 128
"""Examples in a file: some 100 MB for the prompts of a large model."""


_TEXTS = ("text_encoder", "tokenizer", "connectors")


def identity(
    examples: Iterable[Example],
    negative_prompt: str,
    encoder: Encoder,
    buckets: Sequence[Bucket],
    dtype: torch.dtype,
) -> str:
    """Name everything that the conditioning depends on; a teacher is its files, not where they lie.

    Args:
        examples: What is encoded, read once.
        negative_prompt: What guidance moves away from.
        encoder: What encodes.
        buckets: The sizes of samples.
        dtype: Of the prompts' tensors.

    Returns:
        A name for a folder.

    Raises:
        PromptError: If examples lack images, or have some that the teacher does not take.
    """
    source, digest = encoder.source, hashlib.sha256()
    total = with_image = with_last = 0
    for example in examples:
        total, with_image = total + 1, with_image + (example.image is not None)
        with_last += example.last_image is not None
        place = bucket_of(example, buckets)
        row = [example.prompt, place, _digest_of_image(example.image)]
        row += [] if example.last_image is None else [_digest_of_image(example.last_image)]
        digest.update(json.dumps(row).encode())
    encoder.check(total, with_image, with_last)
    texts = [name for name, value in source.index().items() if isinstance(value, list) and name.startswith(_TEXTS)]
    parts: list[object] = [negative_prompt, _weights(source, sorted(texts)), None]
    parts += [encoder.max_sequence_length, str(dtype), CHUNK]
    if with_image:
        parts += [[(b.width, b.height, b.frames) for b in buckets], source.pipeline]
        parts += [_weights(source, ("processor", *IMAGE_PARTS, "vae"))]
    if encoder.dtype != torch.float32:
        parts += [f"encoded in {encoder.dtype}"]
    digest.update(json.dumps(parts).encode())
    return f"prompts-{digest.hexdigest()[:24]}"


def _digest_of_image(image: Path | bytes | None) -> str | None:
    if image is None:
        return None
    if isinstance(image, bytes):
        return sha256_of_bytes(image)
    return sha256_of(image)


def _weights(source: TeacherSource, components: Sequence[str]) -> str:
    folder, digest = source.folder(components), hashlib.sha256()
    for file in (file for component in components for file in sorted((folder / component).glob("*"))):
        digest.update(f"{file.name} {sha256_of(file)}".encode())
    return digest.hexdigest()
