"""Training prompts, with images for teachers that take one, and the conditioning tensors made of them.

Prompts come from a text file, one a line, or from a .jsonl file with a prompt and an image a line. Conditioning is
computed once, kept on disk by the content it depends on, and the encoders are gone from memory before training starts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from pdmd_core.families import ModelFamily
from training.command_line import UserError
from training.teacher import TeacherSource, load_text_side, move

Item = TypeVar("Item")


class PromptError(UserError):
    """Prompts or images that cannot be used: one line."""


@dataclass(frozen=True)
class Example:
    """What a sample is conditioned on."""

    prompt: str
    image: Path | None = None


@dataclass(frozen=True)
class SampleSize:
    """Pixels, frames and the length to which prompts are padded."""

    height: int
    width: int
    frames: int
    max_sequence_length: int


def read_examples(path: Path) -> list[Example]:
    """The examples in a UTF-8 file; empty lines and lines that start with # are left out. Raises PromptError.

    ``.jsonl``: ``{"prompt": "...", "image": "file, relative to this one"}`` a line, the image is optional. Any other
    name: a prompt a line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PromptError(f"{path}: no such prompt file; expected a text file with one prompt a line") from None
    except IsADirectoryError:
        raise PromptError(f"{path}: is a folder; expected a text file with one prompt a line") from None
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise PromptError(f"{path}: no prompts in it; expected one prompt a line")
    if path.suffix == ".jsonl":
        return [_example(path, number, line) for number, line in lines]
    return [Example(line) for _, line in lines]


def _example(path: Path, number: int, line: str) -> Example:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    known = isinstance(entry, dict) and set(entry) <= {"prompt", "image"} and isinstance(entry.get("prompt"), str)
    if not known or not isinstance(entry.get("image"), str | None):
        raise PromptError(f'{path}, line {number}: expected {{"prompt": "...", "image": "file"}}, found {line[:60]}')
    image = path.parent / entry["image"] if entry.get("image") else None
    if image is not None and not image.is_file():
        raise PromptError(f"{path}, line {number}: there is no image {image}")
    return Example(entry["prompt"], image)


def read_prompts(path: Path) -> list[str]:
    """The prompts of ``read_examples``."""
    return [example.prompt for example in read_examples(path)]


@dataclass(frozen=True)
class PromptBank:
    """Conditioning tensors of all examples; first axis = example.

    negative: those that are others with the negative prompt; one row for all examples, or one for each.
    """

    prompts: list[str]
    embeddings: dict[str, Tensor]
    negative: dict[str, Tensor]

    def conditioning(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        """Conditioning of these examples (batch,) on a device."""
        return {name: value[indices].to(device) for name, value in self.embeddings.items()}

    def negative_conditioning(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        """Conditioning of these examples (batch,) with the negative prompt in place of theirs."""
        chosen = {
            name: value[indices] if len(value) > 1 else value.expand(len(indices), *value.shape[1:])
            for name, value in self.negative.items()
        }
        same = {name: value[indices] for name, value in self.embeddings.items() if name not in chosen}
        return {name: value.to(device) for name, value in (chosen | same).items()}


def encode_examples(
    examples: Sequence[Example],
    negative_prompt: str,
    source: TeacherSource,
    family: ModelFamily,
    size: SampleSize,
    cache_dir: Path,
    device: torch.device | str = "cpu",
    batch: int = 64,
) -> PromptBank:
    """Conditioning as the teacher's pipeline computes it, or what an earlier run left in ``cache_dir``.

    Images are brought to the size of the samples. Raises PromptError when the teacher takes images and an example
    has none, or the other way round.
    """
    takes_image = _check_images(examples, source, family)
    path = cache_dir / f"prompts-{_identity(examples, negative_prompt, source, size, takes_image)}.safetensors"
    if not path.exists():
        pipeline = move(load_text_side(source, takes_image), device)
        tensors = _Encoder(pipeline, family, size, batch).encode(examples, negative_prompt)
        cache_dir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.part")
        save_file(tensors, temporary)
        temporary.replace(path)
    tensors = load_file(path)
    count = len(examples)
    return PromptBank(
        [example.prompt for example in examples],
        {name: value[:count] for name, value in tensors.items()},
        {name: value[count:] for name, value in tensors.items() if len(value) > count},
    )


def _check_images(examples: Sequence[Example], source: TeacherSource, family: ModelFamily) -> bool:
    """Whether the teacher takes images."""
    kind = source.pipeline_class()
    takes, given = family.takes_image(kind), sum(example.image is not None for example in examples)
    if takes and given < len(examples):
        raise PromptError(
            f"{kind.__name__} takes an image with each prompt, {len(examples) - given} of {len(examples)} have none; "
            'prompts with images are a .jsonl file with {"prompt": "...", "image": "file"} a line'
        )
    if given and not takes:
        raise PromptError(
            f"{kind.__name__} takes no images, {given} prompts have one; set model.pipeline to one that does"
        )
    return takes


class _Encoder:
    """The encoders of a pipeline, asked in batches. Rows of what they give: all examples, then the negative prompt."""

    def __init__(self, pipeline: DiffusionPipeline, family: ModelFamily, size: SampleSize, batch: int) -> None:
        self.pipeline, self.family, self.size, self.batch = pipeline, family, size, batch

    def encode(self, examples: Sequence[Example], negative_prompt: str) -> dict[str, Tensor]:
        prompts = [example.prompt for example in examples]
        images = [example.image for example in examples if example.image is not None]
        if not images:
            return self._in_batches([*prompts, negative_prompt], self._prompts)
        if self.family.prompts_see_images(self.pipeline):
            texts = [*prompts, *[negative_prompt] * len(prompts)]
            tensors = self._in_batches(list(zip(texts, images * 2, strict=True)), self._prompts_with_images)
        else:
            tensors = self._in_batches([*prompts, negative_prompt], self._prompts)
        return tensors | self._in_batches(images, self._images)

    def _prompts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return self.family.encode_prompts(self.pipeline, texts, self.size.max_sequence_length)

    def _prompts_with_images(self, pairs: Sequence[tuple[str, Path]]) -> dict[str, Tensor]:
        texts, images = [text for text, _ in pairs], [self._open(path) for _, path in pairs]
        return self.family.encode_prompts(self.pipeline, texts, self.size.max_sequence_length, images)

    def _images(self, paths: Sequence[Path]) -> dict[str, Tensor]:
        images = [self._open(path) for path in paths]
        return self.family.encode_images(self.pipeline, images, self.size.height, self.size.width, self.size.frames)

    def _open(self, path: Path) -> Image.Image:
        """The image in the size of the samples; what has another aspect ratio is cut around its middle."""
        try:
            image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        except OSError as error:
            raise PromptError(f"{path}: not a readable image ({error})") from None
        return ImageOps.fit(image, (self.size.width, self.size.height))

    def _in_batches(
        self, items: Sequence[Item], encode: Callable[[Sequence[Item]], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        starts = tqdm(range(0, len(items), self.batch), desc="embed prompts", disable=len(items) < 10 * self.batch)
        parts = [encode(items[i : i + self.batch]) for i in starts]
        return {name: _joined([part[name].cpu() for part in parts]) for name in parts[0]}


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One tensor; zeros follow the tokens of batches that have fewer of them."""
    longest = max(part.shape[1] for part in parts)
    padded = [functional.pad(part, (0, 0) * (part.ndim - 2) + (0, longest - part.shape[1])) for part in parts]
    return torch.cat(padded).contiguous()


def _identity(
    examples: Sequence[Example], negative_prompt: str, source: TeacherSource, size: SampleSize, images: bool
) -> str:
    """Of everything that the conditioning depends on; a local teacher is its weights, not where it lies."""
    prompts = [example.prompt for example in examples]
    parts: list[object] = [prompts, negative_prompt, _weights(source.path, ("text_encoder", "tokenizer"))]
    parts += [source.revision, size.max_sequence_length]
    if images:
        parts += [_digest([example.image for example in examples if example.image is not None])]
        parts += [size.height, size.width, size.frames, source.pipeline]
        parts += [_weights(source.path, ("processor", "image_encoder", "image_processor", "vae"))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _weights(model: str, components: Iterable[str]) -> str:
    folder = Path(model)
    if not folder.is_dir():
        return model
    return _digest([file for component in components for file in sorted((folder / component).glob("*"))])


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
