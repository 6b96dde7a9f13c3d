"""What the rest of the project asks of a model family; each family is one file beside this one."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..flow import Sigma, at_least_float32
from ..phases import PhasePlan

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

Conditioning = Mapping[str, Tensor]
"""Named conditioning tensors, each of shape (batch, ...): ``{"prompt_embeds": (batch, tokens, features)}``."""


@dataclass(frozen=True)
class TeacherRouting:
    """Which network of a teacher runs where: the first at sigma >= boundary, the second below.

    A property of the teacher, apart from the phase plan. components: names in the pipeline, one or two.
    """

    components: tuple[str, ...] = ("transformer",)
    boundary: float | None = None

    def __post_init__(self) -> None:
        if len(self.components) != (1 if self.boundary is None else 2):
            raise ValueError(
                f"a teacher has one network, or two and a boundary in sigma, found {', '.join(self.components)} and "
                f"boundary {self.boundary}"
            )

    def first_runs(self, sigma: Tensor) -> Tensor:
        """Where the first network runs, of the shape of sigma."""
        return sigma >= (self.boundary or 0.0)

    def component_at(self, sigma: float) -> str:
        """The network that runs at this sigma."""
        return self.components[0 if self.boundary is None or sigma >= self.boundary else 1]


def classifier_free_guidance(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """``negative + scale * (positive - negative)`` of two velocities, in float32 or better."""
    positive, negative = at_least_float32(positive), at_least_float32(negative)
    return negative + scale * (positive - negative)


class ModelFamily(ABC):
    """The latent shapes of a family, how its network takes sigma and conditioning, and its names in expert files."""

    name: str
    """The key of ``families.FAMILIES``, also written into manifests."""
    architecture: str
    """Class name of the network in diffusers."""
    lora_targets: tuple[str, ...]
    """Module name suffixes that LoRA experts adapt unless a config says otherwise."""

    @abstractmethod
    def latent_shape(self, pipeline: DiffusionPipeline, height: int, width: int, frames: int) -> tuple[int, ...]:
        """Shape of one latent, without the batch, for a picture or clip of this size in pixels and frames.

        Raises ValueError when the model has no such size.
        """

    @abstractmethod
    def velocity(self, network: nn.Module, x: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        """The network's velocity at x of shape (batch, ...) and sigma in [0, 1] (number or shape (batch,))."""

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """The guided velocity from those with prompt and negative prompt, as the pipeline combines them."""
        return classifier_free_guidance(positive, negative, scale)

    def teacher_routing(self, config: Mapping[str, Any]) -> TeacherRouting:
        """Which networks a pipeline with this config (model_index.json) runs where; one network by default."""
        return TeacherRouting()

    @abstractmethod
    def encode_prompts(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        max_sequence_length: int,
        images: Sequence[Image] | None = None,
    ) -> dict[str, Tensor]:
        """Conditioning of these prompts, exactly as the pipeline's own call computes it.

        Fewer tokens than max_sequence_length may be returned if zeros after them change nothing (a mask says so).
        images: one for each prompt, for pipelines whose text encoder sees them (``prompts_see_images``).
        """

    def takes_image(self, pipeline: DiffusionPipeline | type[DiffusionPipeline]) -> bool:
        """Whether the pipeline's call is given an image with each prompt."""
        return "image" in inspect.signature(pipeline.__call__).parameters

    def prompts_see_images(self, pipeline: DiffusionPipeline) -> bool:
        """Whether the text encoder sees the image beside the prompt."""
        return False

    def encode_images(
        self, pipeline: DiffusionPipeline, images: Sequence[Image], height: int, width: int, frames: int
    ) -> dict[str, Tensor]:
        """Conditioning of these images beside that of the prompts, exactly as the pipeline's own call computes it.

        height, width, frames: of the sample, in pixels. Only for pipelines that take an image.
        """
        raise ValueError(f"{type(pipeline).__name__} takes no image")

    @abstractmethod
    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        """Latents as sampled to pixels in [0, 1] of shape (batch, frames, 3, height, width)."""

    @abstractmethod
    def native_module_name(self, diffusers_name: str) -> str:
        """A module's name in the original layout, which ComfyUI and LoRA files use.

        Raises ValueError for a module that has no counterpart there.
        """

    @abstractmethod
    def diffusers_module_name(self, native_name: str) -> str:
        """The inverse of ``native_module_name``."""

    @abstractmethod
    def native_weight_name(self, diffusers_name: str) -> str:
        """The name of any of the network's weights in the original layout, which ComfyUI loads.

        Raises ValueError for a weight that has no counterpart there.
        """

    def comfyui_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What ComfyUI would guess wrong about a network with this diffusers config; empty for released sizes."""
        return {}

    def stock_routing(self, plan: PhasePlan, components: Sequence[str]) -> dict[str, Any]:
        """Entries of model_index.json with which the stock pipeline runs phase k on ``components[k]``.

        Raises ValueError when it cannot.
        """
        if set(components) == {"transformer"}:
            return {}
        raise ValueError(f"a stock pipeline of {self.name} holds one network, these experts take {len(components)}")


def picture_latent_size(
    model: str, pipeline: DiffusionPipeline, height: int, width: int, frames: int
) -> tuple[int, int]:
    """Height and width of the latents of a model of pictures whose network takes patches of 2 x 2.

    Raises ValueError for other sizes, and for clips.
    """
    factor = pipeline.vae_scale_factor
    side = 2 * factor
    if height % side or width % side or height < side or width < side:
        raise ValueError(f"{model} pictures have sides that are multiples of {side}, found {width}x{height}")
    if frames != 1:
        raise ValueError(f"{model} makes pictures, 1 frame, found {frames}")
    return height // factor, width // factor
