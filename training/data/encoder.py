"""The encoders of a teacher's pipeline: examples in, conditioning tensors out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn import functional

from pdmd_core.families import ModelFamily
from training.data.buckets import Bucket
from training.data.examples import Example, PromptError
from training.data.images import open_image
from training.data.teacher import TeacherSource, load_text_side, move

Item = TypeVar("Item")


class Encoder:
    """Encodes in batches with the teacher's own encoders, which are loaded when they are first needed.

    Those of prompts are in ``dtype``, those of images in float32. Where memory runs out, batches are halved.
    """

    def __init__(
        self,
        source: TeacherSource,
        family: ModelFamily,
        max_sequence_length: int,
        device: torch.device | str = "cpu",
        batch: int = 32,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.source, self.family, self.max_sequence_length = source, family, max_sequence_length
        self.device, self.batch, self.dtype = device, batch, dtype
        kind = source.pipeline_class()
        self.takes_image, self.needs_image = family.takes_image(kind), family.needs_image(kind)
        self._pipeline: DiffusionPipeline | None = None

    @property
    def pipeline(self) -> DiffusionPipeline:
        """The pipeline with its encoders."""
        if self._pipeline is None:
            side = load_text_side(self.source, self.family, self.takes_image, self.dtype)
            self._pipeline = move(side, self.device)
        return self._pipeline

    def close(self) -> None:
        """Let go of the encoders, whose memory others need."""
        self._pipeline = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def check(self, total: int, with_image: int, with_last: int = 0) -> None:
        """All examples have the images that the teacher takes, and none otherwise. Raises PromptError."""
        kind = self.source.pipeline_class().__name__
        if self.takes_image and not self.needs_image and 0 < with_image < total:
            raise PromptError(
                f"{kind} takes prompts with an image each or without any, {total - with_image} of {total} have none: "
                "make two files of them, and two runs"
            )
        if self.needs_image and with_image < total:
            raise PromptError(
                f"{kind} takes an image with each prompt, {total - with_image} of {total} have none; prompts with "
                'images are a .jsonl file with {"prompt": "...", "image": "file"} a line, or a dataset with both'
            )
        if with_image and not self.takes_image:
            raise PromptError(
                f"{kind} takes no images, {with_image} prompts have one; leave them out, or name a pipeline class that "
                "takes images"
            )
        if with_last and not (self.takes_image and self.family.takes_last_image(self.source.pipeline_class())):
            raise PromptError(f"{kind} takes no last image, {with_last} prompts have one: leave them out")
        needed = self.takes_image and self.family.needs_last_image(self.source.network_config())
        if with_last < total and (with_last or needed):
            why = "this teacher makes clips between two images" if needed else "all have one or none"
            raise PromptError(
                f"{total - with_last} of {total} prompts have no last image, and {why}: give it in last_image"
            )

    def texts(self, examples: Sequence[Example], bucket: Bucket | None) -> dict[str, Tensor]:
        """Conditioning of the prompts, one row for each."""
        return self._of_prompts([example.prompt for example in examples], examples, bucket)

    def negatives(self, prompt: str, examples: Sequence[Example], bucket: Bucket | None) -> dict[str, Tensor]:
        """Conditioning of the negative prompt beside the image of each example; empty where images do not matter."""
        if not self._text_sees_images:
            return {}
        return self._of_prompts([prompt] * len(examples), examples, bucket)

    def negative(self, prompt: str) -> dict[str, Tensor]:
        """Conditioning of the negative prompt, one row for all examples; empty where ``negatives`` has them."""
        if self._text_sees_images:
            return {}
        return self.family.encode_prompts(self.pipeline, [prompt], self.max_sequence_length)

    def images(self, examples: Sequence[Example], bucket: Bucket | None) -> dict[str, Tensor]:
        """Conditioning of the images, one row for each; empty for teachers that take none."""
        if bucket is None or examples[0].image is None:
            return {}

        def encode(part: Sequence[Example]) -> dict[str, Tensor]:
            images = [open_image(example, bucket.width, bucket.height) for example in part]
            size = bucket.height, bucket.width, bucket.frames
            if part[0].last_image is None:
                return self.family.encode_images(self.pipeline, images, *size)
            last = [open_image(example, bucket.width, bucket.height, last=True) for example in part]
            return self.family.encode_first_and_last(self.pipeline, images, last, *size)

        return self._in_batches(examples, encode)

    def longer(self, examples: Sequence[Example]) -> int:
        """How many prompts have more tokens than ``max_sequence_length``: their ends are cut off."""
        tokens = self.pipeline.tokenizer([example.prompt for example in examples], padding=False, truncation=False)
        return sum(len(row) > self.max_sequence_length for row in tokens["input_ids"])

    @property
    def _text_sees_images(self) -> bool:
        return self.takes_image and self.family.prompts_see_images(self.pipeline)

    def _of_prompts(
        self, prompts: Sequence[str], examples: Sequence[Example], bucket: Bucket | None
    ) -> dict[str, Tensor]:
        def encode(part: Sequence[tuple[str, Example]]) -> dict[str, Tensor]:
            images = None
            if self._text_sees_images and bucket is not None:
                images = [open_image(example, bucket.width, bucket.height) for _, example in part]
            texts = [text for text, _ in part]
            return self.family.encode_prompts(self.pipeline, texts, self.max_sequence_length, images)

        return self._in_batches(list(zip(prompts, examples, strict=True)), encode)

    def _in_batches(
        self, items: Sequence[Item], encode: Callable[[Sequence[Item]], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        parts: list[dict[str, Tensor]] = []
        done = 0
        while done < len(items):
            try:
                parts.append(encode(items[done : done + self.batch]))
                done += self.batch
            except ValueError as error:  # what a family's model does not take
                raise PromptError(str(error)) from None
            except torch.OutOfMemoryError:
                if self.batch == 1:
                    raise
                self.batch //= 2
        return {name: _joined([part[name].cpu() for part in parts]) for name in parts[0]}


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One tensor; zeros follow the tokens of batches that have fewer of them."""
    longest = max(part.shape[1] for part in parts)
    padded = [functional.pad(part, (0, 0) * (part.ndim - 2) + (0, longest - part.shape[1])) for part in parts]
    return torch.cat(padded).contiguous()
