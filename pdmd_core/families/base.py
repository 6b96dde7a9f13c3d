"""What the rest of the project asks of a model family; each family is one file beside this one.

Everywhere outside a family, sigma in [0, 1] is the only coordinate of noise, ``x_sigma = (1 - sigma) x_0 + sigma
noise``, and a velocity is ``noise - x_0`` (rectified flow, arXiv 2510.27684, section 2.1).
"""

from __future__ import annotations

import inspect
import re
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

    It is a property of the teacher, apart from the phase plan of the experts.

    Attributes:
        components: Names of the networks in the pipeline, one or two, high noise first.
        boundary: Sigma from which the first network runs; None for one network.

    Raises:
        ValueError: The number of networks does not fit the boundary.
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
        """Returns where the first network runs, a boolean tensor of the shape of sigma."""
        return sigma >= (self.boundary or 0.0)

    def component_at(self, sigma: float) -> str:
        """Returns the name of the network that runs at this sigma."""
        return self.components[0 if self.boundary is None or sigma >= self.boundary else 1]


@dataclass(frozen=True)
class LoraKeys:
    """How a family's LoRA files name their tensors, so that diffusers and ComfyUI both read them at strength 1.0.

    Attributes:
        prefix: What comes before the native name of a module.
        down: What comes after it for the projection to the rank, of shape (rank, in).
        up: What comes after it for the projection from the rank, of shape (out, rank).
        alpha: What comes after it for alpha, a single number. None where the pipeline's own loader refuses such a
            tensor: ``up`` is then stored multiplied by alpha / rank, and the file's alpha is its rank.
    """

    prefix: str = "diffusion_model."
    down: str = ".lora_down.weight"
    up: str = ".lora_up.weight"
    alpha: str | None = ".alpha"

    def alpha_in_file(self, rank: int, alpha: float) -> float:
        """Returns the alpha by which a file's weights count, for a LoRA of this rank and alpha in training."""
        return float(alpha if self.alpha else rank)


def classifier_free_guidance(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Returns ``negative + scale * (positive - negative)`` of two velocities, in float32 or better.

    Args:
        positive: Velocity with the prompt, of any shape.
        negative: Velocity with the negative prompt, of the same shape.
        scale: 1 is no guidance.
    """
    positive, negative = at_least_float32(positive), at_least_float32(negative)
    return negative + scale * (positive - negative)


class ModelFamily(ABC):
    """Every fact about one network class of diffusers and the pipelines around it.

    A subclass has no state. It states the attributes without a value here, implements the abstract methods, and states
    or overrides the others only where its model differs.
    """

    name: str
    """The key in ``FAMILIES`` and the name of the module; manifests carry it."""
    title: str
    """What the model is called in messages."""
    architecture: str
    """Class name of the network in diffusers."""

    blocks: tuple[str, ...]
    """Names of the network's lists of blocks, whose linear layers LoRA experts adapt."""
    modules: Mapping[str, str]
    """Linear layers of a block that LoRA files may adapt: their names in diffusers to those in the native layout, which
    is the one of the original code, of ComfyUI and of LoRA files."""
    lora_targets: tuple[str, ...]
    """Those of ``modules`` that LoRA experts adapt unless a configuration says otherwise: all but the modulation."""
    lora_keys: LoraKeys = LoraKeys()
    """How LoRA files name their tensors."""
    default_base: str | None = None
    """Hub id of the base that most LoRA files released by others belong to; None where there is none to assume."""

    guidance_argument: str = "guidance_scale"
    """Argument of the pipeline's call that sets classifier-free guidance."""
    unguided: float = 1.0
    """Its value for no guidance: 0 in pipelines that count what is added."""
    makes_clips: bool = False
    """Whether the pipeline's call takes ``num_frames`` and returns ``frames``; it returns ``images`` otherwise."""
    comfyui_sampling: str = "ModelSamplingSD3"
    """ComfyUI's own node that sets the shift of this model."""
    comfyui_pipelines: tuple[str, ...] = ()
    """Pipeline classes whose folders the nodes load into ComfyUI, which needs ``native_autoencoder``."""

    # --- the network ---------------------------------------------------------

    @abstractmethod
    def latent_shape(self, pipeline: DiffusionPipeline, height: int, width: int, frames: int) -> tuple[int, ...]:
        """Returns the shape of one latent, without the batch.

        Args:
            pipeline: A pipeline with its network and autoencoder, or their configurations on the meta device.
            height: Of the sample, in pixels.
            width: Of the sample, in pixels.
            frames: Of the sample; 1 for a picture.

        Raises:
            ValueError: The model has no such size; one line that says which it has.
        """

    @abstractmethod
    def velocity(self, network: nn.Module, x: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        """Returns the network's velocity ``noise - x_0``, of the shape of x.

        Args:
            network: An instance of ``architecture``.
            x: Latents of shape (batch, *latent_shape).
            sigma: Noise level in [0, 1], a number or a tensor of shape (batch,).
            conditioning: What ``encode_prompts`` and ``encode_images`` return, of the same batch.
        """

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Returns the guided velocity as the pipeline combines the two, of their shape.

        Args:
            positive: Velocity with the prompt, of shape (batch, *latent_shape).
            negative: Velocity with the negative prompt, of the same shape.
            scale: Counted so that 1 is none, also where the pipeline counts from 0.
        """
        return classifier_free_guidance(positive, negative, scale)

    def teacher_routing(self, config: Mapping[str, Any]) -> TeacherRouting:
        """Returns which networks a pipeline runs where; one network by default.

        Args:
            config: The pipeline's configuration (``model_index.json``).
        """
        return TeacherRouting()

    # --- the pipeline --------------------------------------------------------

    @abstractmethod
    def encode_prompts(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        max_sequence_length: int,
        images: Sequence[Image] | None = None,
    ) -> dict[str, Tensor]:
        """Returns the conditioning of prompts, exactly as the pipeline's own call computes it, a row for each.

        Args:
            pipeline: A pipeline with its text encoder.
            prompts: Texts.
            max_sequence_length: As in the pipeline's call. Fewer tokens may be returned if zeros after them change
                nothing, which a tensor ``prompt_mask`` of shape (batch, tokens) says.
            images: One for each prompt, where the text encoder sees them (``prompts_see_images``).
        """

    @abstractmethod
    def conditioning_shapes(
        self, config: Mapping[str, Any], tokens: int, latent: Sequence[int]
    ) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of one example's conditioning, without the batch, as far as the network's config tells.

        Args:
            config: The network's ``config.json``.
            tokens: Of the prompt.
            latent: ``latent_shape`` of the sample.
        """

    def takes_image(self, pipeline: DiffusionPipeline | type[DiffusionPipeline]) -> bool:
        """Returns whether the pipeline's call is given an image with each prompt."""
        return "image" in inspect.signature(pipeline.__call__).parameters

    def prompts_see_images(self, pipeline: DiffusionPipeline) -> bool:
        """Returns whether the text encoder sees the image beside the prompt."""
        return False

    def encode_images(
        self, pipeline: DiffusionPipeline, images: Sequence[Image], height: int, width: int, frames: int
    ) -> dict[str, Tensor]:
        """Returns the conditioning of images, exactly as the pipeline's own call computes it, a row for each.

        Args:
            pipeline: A pipeline that takes images, with its autoencoder and image encoder.
            images: One for each sample.
            height: Of the sample, in pixels.
            width: Of the sample, in pixels.
            frames: Of the sample.

        Raises:
            ValueError: The pipeline takes no image.
        """
        raise ValueError(f"{type(pipeline).__name__} takes no image")

    @abstractmethod
    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        """Returns pixels in [0, 1] of shape (batch, frames, 3, height, width).

        Args:
            pipeline: A pipeline with its autoencoder.
            latents: As sampled, of shape (batch, *latent_shape).
        """

    def guidance_arguments(self, scale: float) -> dict[str, float]:
        """Returns the arguments of the pipeline's call for guidance of this scale.

        Guidance that is an input of a guidance-distilled network (FLUX's ``guidance_scale``) is not meant: it is no
        classifier-free guidance and stays as the pipeline has it.

        Args:
            scale: Counted so that 1 is none.

        Example:
            >>> family("z_image").guidance_arguments(1.0)
            {'guidance_scale': 0.0}
        """
        return {self.guidance_argument: scale - 1.0 + self.unguided}

    def stock_routing(self, plan: PhasePlan, components: Sequence[str]) -> dict[str, Any]:
        """Returns entries of ``model_index.json`` with which the stock pipeline runs phase k on ``components[k]``.

        Args:
            plan: The phases of the experts.
            components: A network of the pipeline for each phase.

        Raises:
            ValueError: The stock pipeline cannot do that.
        """
        if set(components) == {"transformer"}:
            return {}
        raise ValueError(f"a stock pipeline of {self.name} holds one network, these experts take {len(components)}")

    # --- LoRA files ----------------------------------------------------------

    def lora_arguments(self, component: str) -> dict[str, Any]:
        """Returns what ``load_lora_weights`` needs to load a file into this network of the pipeline.

        Raises:
            ValueError: The pipeline's loader does not reach this network.
        """
        if component == "transformer":
            return {}
        raise ValueError(f"the LoRA loader of {self.title} pipelines reaches transformer alone, found {component}")

    def owns_lora(self, modules: Sequence[str]) -> bool:
        """Returns whether module names can only be of this family; false where other models have them too.

        Args:
            modules: Names of all modules that a LoRA file adapts, in any layout and with any prefix.
        """
        return False

    def released_components(self, files: int) -> tuple[str, ...]:
        """Returns the networks that this many LoRA files, released together by others, are for; high noise first."""
        return ("transformer",) * files

    def native_module_name(self, diffusers_name: str) -> str:
        """Returns a module's name in the native layout.

        Raises:
            ValueError: It is none that a LoRA file may adapt.
        """
        return self._renamed(diffusers_name, self.modules)

    def diffusers_module_name(self, native_name: str) -> str:
        """Returns a module's name in diffusers, the inverse of ``native_module_name``.

        Raises:
            ValueError: It is none that a LoRA file may adapt.
        """
        return self._renamed(native_name, {native: own for own, native in self.modules.items()})

    def _renamed(self, name: str, names: Mapping[str, str]) -> str:
        match = re.fullmatch(rf"((?:{'|'.join(self.blocks)})\.\d+)\.(.+)", name)
        if not match or match[2] not in names:
            raise ValueError(
                f"a {self.title} module to adapt is {'|'.join(self.blocks)}.<n>.<one of {', '.join(names)}>, found "
                f"{name!r}"
            )
        return f"{match[1]}.{names[match[2]]}"

    # --- ComfyUI -------------------------------------------------------------

    @abstractmethod
    def native_weight_name(self, diffusers_name: str) -> str:
        """Returns the name of any of the network's weights in the native layout, which ComfyUI loads.

        Raises:
            ValueError: The weight has no counterpart there.
        """

    def comfyui_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what ComfyUI would guess wrong about a network; nothing for released sizes.

        Args:
            config: The network's ``config.json``.
        """
        return {}

    def native_autoencoder(self, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns an autoencoder's weights in the native layout, which ComfyUI loads.

        Args:
            config: The autoencoder's ``config.json``.
            state: Its weights by their names in diffusers.

        Raises:
            ValueError: ComfyUI does not load this one from diffusers' layout.
        """
        raise ValueError(f"the autoencoder of {self.title} is not converted from diffusers' layout for ComfyUI")


def picture_latent_size(
    model: str, pipeline: DiffusionPipeline, height: int, width: int, frames: int
) -> tuple[int, int]:
    """Returns height and width of the latents of a model of pictures whose network takes patches of 2 x 2.

    Args:
        model: What the model is called in messages.
        pipeline: A pipeline with ``vae_scale_factor``.
        height: Of the picture, in pixels.
        width: Of the picture, in pixels.
        frames: 1.

    Raises:
        ValueError: The model has no such size, or it is of a clip.
    """
    factor = pipeline.vae_scale_factor
    side = 2 * factor
    if height % side or width % side or height < side or width < side:
        raise ValueError(f"{model} pictures have sides that are multiples of {side}, found {width}x{height}")
    if frames != 1:
        raise ValueError(f"{model} makes pictures, 1 frame, found {frames}")
    return height // factor, width // factor
