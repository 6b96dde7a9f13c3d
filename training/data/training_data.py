"""Everything that the samples of a run are made of, from its configuration."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline

from pdmd_core.families import ModelFamily
from training.config.schema import ConfigError, DistillConfig
from training.data.buckets import Bucket, buckets_in
from training.data.encoder import Encoder
from training.data.examples import Example, PromptError
from training.data.order import ExampleOrder
from training.data.prompt_cache import PromptCache, open_prompt_cache
from training.data.teacher import TeacherSource, text_dtype

VALIDATED = 4
"""Examples of a validation when the configuration names none."""


@dataclass(frozen=True)
class TrainingData:
    """Conditioning of the examples, the sizes of samples, and the order in which batches come."""

    prompts: PromptCache
    buckets: list[Bucket]
    shapes: list[tuple[int, ...]]
    """Of a latent in each bucket."""
    order: ExampleOrder
    validation: PromptCache
    """Conditioning of what validations sample, in the size of the configuration's section model."""
    validation_shape: tuple[int, ...]
    measured: PromptCache | None = None
    """Conditioning of what is sampled for features, in the same size."""


def buckets_of(config: DistillConfig) -> list[Bucket]:
    """The buckets that a configuration gives, or that its data names.

    Args:
        config: The configuration of a run.

    Raises:
        PromptError: The data cannot be read, or an example asks for no size.
    """
    model, given = config.model, config.data.buckets
    if given is None:
        return [Bucket(model.width, model.height, model.frames)]
    if given == "columns":
        return buckets_in(config.data, model.frames)
    return given


def latent_shapes(buckets: Sequence[Bucket], family: ModelFamily, pipeline: DiffusionPipeline) -> list[tuple[int, ...]]:
    """Shape of a latent in each bucket.

    Args:
        buckets: The sizes of samples.
        family: The teacher's family.
        pipeline: The teacher's pipeline.

    Raises:
        ConfigError: The model does not have a size.
    """
    shapes = []
    for bucket in buckets:
        try:
            shapes.append(family.latent_shape(pipeline, bucket.height, bucket.width, bucket.frames))
        except ValueError as error:
            raise ConfigError(f"model and data.buckets: {error}") from None
    return shapes


def training_data(
    config: DistillConfig,
    source: TeacherSource,
    family: ModelFamily,
    pipeline: DiffusionPipeline,
    device: torch.device | str = "cpu",
    check: Callable[[str], None] | None = None,
) -> TrainingData:
    """Read and encode, or find what was encoded before. All processes call this together.

    The encoders are gone at the end: networks come after this.

    Args:
        config: The configuration of the run.
        source: Where the teacher's encoders are.
        family: The teacher's family.
        pipeline: The teacher's pipeline, for the sizes of latents; its weights may be on the meta device.
        device: Where prompts and images are encoded.
        check: Told what identifies the examples before they are encoded; what it raises ends this.

    Raises:
        PromptError: A prompt or an image cannot be used, or no example suits a bucket that has a share.
        ConfigError: The model does not have a size.
    """
    examples, model = config.data, config.model
    buckets, whole = buckets_of(config), Bucket(model.width, model.height, model.frames)
    shapes, (validation_shape,) = latent_shapes(buckets, family, pipeline), latent_shapes([whole], family, pipeline)
    dtype: torch.dtype = getattr(torch, model.dtype)
    encoder = Encoder(source, family, model.max_sequence_length, device, dtype=text_dtype(dtype))
    fixed = config.validation.prompts or []
    if fixed and (encoder.needs_image or next(iter(examples)).image is not None):
        raise PromptError(
            "validation.prompts: the teacher takes images; leave it out to see the first training prompts"
        )
    shown = [Example(prompt) for prompt in fixed] or list(itertools.islice(examples, VALIDATED))
    cache = config.data.cache_dir or config.output_dir / "cache"
    bank = open_prompt_cache(examples, config.data.negative_prompt, encoder, buckets, cache, dtype, check)
    validation = open_prompt_cache(shown, config.data.negative_prompt, encoder, [whole], cache, dtype)
    if bank.longer and int(os.environ.get("RANK", "0")) == 0:
        print(
            f"warning: {bank.longer} of {len(bank)} prompts have more than {model.max_sequence_length} tokens, whose "
            "rest is cut off: raise model.max_sequence_length, or shorten them",
            file=sys.stderr,
        )
    measured = None
    if config.validation.features:
        first = list(itertools.islice(examples, config.validation.features_prompts))
        measured = open_prompt_cache(first, config.data.negative_prompt, encoder, [whole], cache, dtype)
    encoder.close()
    members = [bank.members(i) for i in range(len(buckets))]
    for bucket, suitable in zip(buckets, members, strict=True):
        if bucket.share and not len(suitable):
            raise PromptError(f"data.buckets: no example of {config.data.prompts} suits {bucket}: leave the bucket out")
    shares = [float(len(m)) if b.share is None else b.share for b, m in zip(buckets, members, strict=True)]
    order = ExampleOrder(members, shares, config.seed)
    return TrainingData(bank, buckets, shapes, order, validation, validation_shape, measured)
