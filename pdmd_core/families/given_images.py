"""What a family says about the images that a pipeline's call is given: by default, none."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .guidance import pipeline_named

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image


class GivenImages:
    """A part of ``ModelFamily``: whether a pipeline is given images, and their conditioning."""

    picture_sets_size: bool = False
    """Whether a call that is given a picture has no ``height`` and ``width``, which it makes of the picture's sides."""

    def image_shapes(self, pipeline: DiffusionPipeline, latent: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Tell the shapes of what the image of an example adds, where the network's configuration does not tell them.

        Args:
            pipeline: A pipeline that takes images, whose weights may be on the meta device.
            latent: The sample's ``latent_shape``; the image has its aspect ratio.

        Returns:
            The shapes without the batch, by the names of ``encode_images``; none by default.
        """
        return {}

    def image_tokens(self, pipeline: DiffusionPipeline, latent: Sequence[int]) -> int:
        """Tell how many tokens a prompt has beside those of its text where the text encoder sees the image.

        Args:
            pipeline: A pipeline that takes images, whose weights may be on the meta device.
            latent: The sample's ``latent_shape``; the image has its aspect ratio.

        Returns:
            The tokens, 0 by default.
        """
        return 0

    def takes_image(self, pipeline: DiffusionPipeline | type[DiffusionPipeline]) -> bool:
        """Tell whether a pipeline's call is given an image with each prompt.

        Args:
            pipeline: The pipeline or its class.

        Returns:
            By default, whether the call has an argument ``image``.
        """
        return "image" in inspect.signature(pipeline.__call__).parameters

    def needs_image(self, pipeline: DiffusionPipeline | type[DiffusionPipeline]) -> bool:
        """Tell whether a pipeline that takes an image with each prompt cannot do without it.

        Args:
            pipeline: The pipeline or its class.

        Returns:
            By default, whether it takes images.
        """
        return self.takes_image(pipeline)

    def pipeline_of_images(self, noted: object, named: object) -> type[DiffusionPipeline] | None:
        """Find the pipeline class that experts need where their base names one that takes no image.

        Args:
            noted: Name of the class that the experts were distilled with.
            named: Name of the class in the base's ``model_index.json``.

        Returns:
            The first of them, where it needs images and the second takes none; None where the base's own will do.
        """
        first, second = pipeline_named(noted), pipeline_named(named)
        if first is None or second is None or not self.needs_image(first) or self.takes_image(second):
            return None
        return first

    def prompts_see_images(self, pipeline: DiffusionPipeline) -> bool:
        """Tell whether the text encoder sees the image beside the prompt.

        Args:
            pipeline: The pipeline.

        Returns:
            False by default.
        """
        return False

    def encode_images(
        self, pipeline: DiffusionPipeline, images: Sequence[Image], height: int, width: int, frames: int
    ) -> dict[str, Tensor]:
        """Encode images exactly as the pipeline's own call does.

        Args:
            pipeline: A pipeline that takes images, with its autoencoder and image encoder.
            images: One for each sample.
            height: Height of the sample in pixels.
            width: Width of the sample in pixels.
            frames: Frames of the sample.

        Returns:
            Conditioning beside that of the prompts, with a row for each image.

        Raises:
            ValueError: If the pipeline takes no image.
        """
        raise ValueError(f"{type(pipeline).__name__} takes no image")

    def takes_last_image(self, pipeline: DiffusionPipeline | type[DiffusionPipeline]) -> bool:
        """Tell whether a pipeline's call may be given the image that a clip ends with, too.

        Args:
            pipeline: The pipeline or its class.

        Returns:
            By default, whether the call has an argument ``last_image``.
        """
        return "last_image" in inspect.signature(pipeline.__call__).parameters

    def needs_last_image(self, config: Mapping[str, Any]) -> bool:
        """Tell whether a network was made for clips between two images.

        Args:
            config: The network's ``config.json``.

        Returns:
            False by default.
        """
        return False

    def encode_first_and_last(
        self,
        pipeline: DiffusionPipeline,
        images: Sequence[Image],
        last_images: Sequence[Image],
        height: int,
        width: int,
        frames: int,
    ) -> dict[str, Tensor]:
        """Encode the images between which clips are made, exactly as the pipeline's own call does.

        Args:
            pipeline: A pipeline that takes both, with its autoencoder and image encoder.
            images: The first image of each sample.
            last_images: The last one.
            height: Height of the sample in pixels.
            width: Width of the sample in pixels.
            frames: Frames of the sample.

        Returns:
            Conditioning beside that of the prompts, with a row for each pair.

        Raises:
            ValueError: If the pipeline does not take both.
        """
        raise ValueError(f"{type(pipeline).__name__} takes no last image")
