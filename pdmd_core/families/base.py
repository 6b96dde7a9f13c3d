"""What the rest of the project asks of a model family; each family is one file beside this one.

Everywhere outside a family, sigma in [0, 1] is the only coordinate of noise, ``x_sigma = (1 - sigma) x_0 + sigma
noise``, and a velocity is ``noise - x_0`` (rectified flow; Phased DMD, arXiv 2510.27684, section 2.1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..flow import Sigma
from ..phases import PhasePlan
from .given_images import GivenImages
from .guidance import classifier_free_guidance
from .lora_files import LoraFiles
from .native_layout import NativeLayout, NativeWeight
from .routing import TeacherRouting

if TYPE_CHECKING:
    from diffusers import ClassifierFreeGuidance, DiffusionPipeline
    from PIL.Image import Image

Conditioning = Mapping[str, Tensor]
"""Named conditioning tensors, each of shape (batch, ...): ``{"prompt_embeds": (batch, tokens, features)}``."""


class ModelFamily(LoraFiles, GivenImages, ABC):
    """Every fact about one network class of diffusers and the pipelines around it.

    A subclass has no state. It states the attributes that have no value here and implements the abstract methods; the
    others it overrides only where its model differs. docs/adding-a-model-family.md goes through them.
    """

    name: str
    """The key in ``FAMILIES`` and the name of the module; manifests carry it."""
    architecture: str
    """Class name of the network in diffusers."""
    extensions: tuple[str, ...] = ()
    """Other network classes that have this one's blocks beside their own, and take its LoRA files."""

    guidance_argument: str = "guidance_scale"
    """The argument of the pipeline's call that sets classifier-free guidance."""
    unguided: float = 1.0
    """Its value for no guidance: 0 in pipelines that count what is added."""
    guider: str | None = None
    """The component that guides, in pipelines whose call has no argument for it."""
    embedded_guidance: float = 1.0
    """What the pipeline's call gives by default to networks that take guidance as an input (``guidance_embeds`` in
    their configuration). It is no classifier-free guidance, and the same for teacher, fake and experts."""
    makes_clips: bool = False
    """Whether the pipeline's call takes ``num_frames`` and returns ``frames``; it returns ``images`` otherwise."""
    call_lacks: tuple[str, ...] = ()
    """Arguments that the calls of most pipelines have, and this one's has not."""
    frame_rate: float = 16.0
    """Frames a second of its clips, where the pipeline's call does not say otherwise."""
    context_parallel: bool = True
    """Whether diffusers divides the tokens of a sample rightly among processes, where it has a plan for it."""
    comfyui_sampling: str = "ModelSamplingSD3"
    """ComfyUI's own node that sets the shift of this model."""
    native_layout: NativeLayout | None = None
    """The native layout, where a weight of it has the rows of several of diffusers'."""
    comfyui_pipelines: tuple[str, ...] = ()
    """Pipeline classes whose folders the nodes load into ComfyUI, which needs ``native_autoencoder``."""

    encoders: tuple[str, ...] = ()
    """Components that a pipeline which encodes prompts cannot be made without, beside text encoders and tokenizers."""

    # --- the network ---------------------------------------------------------

    @abstractmethod
    def latent_shape(self, pipeline: DiffusionPipeline, height: int, width: int, frames: int) -> tuple[int, ...]:
        """Tell the shape of one latent.

        Args:
            pipeline: A pipeline with network and autoencoder, whose weights may be on the meta device.
            height: Height of the sample in pixels.
            width: Width of the sample in pixels.
            frames: Frames of the sample; 1 for a picture.

        Returns:
            The shape without the batch. Everywhere outside the family latents have this shape.

        Raises:
            ValueError: If the model has no such size; one line says which it has.
        """

    @abstractmethod
    def velocity(self, network: nn.Module, x: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        """Evaluate the network.

        Args:
            network: An instance of ``architecture``.
            x: Latents of shape (batch, *latent_shape).
            sigma: The noise level in [0, 1], a number or a tensor of shape (batch,).
            conditioning: What ``encode_prompts`` and ``encode_images`` give, for the same batch.

        Returns:
            The velocity ``noise - x_0``, of the shape of x.
        """

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Guide a velocity as the pipeline does.

        Args:
            positive: The velocity with the prompt, of shape (batch, *latent_shape).
            negative: The velocity with the negative prompt, of the same shape.
            scale: The scale, counted so that 1 is none, also where the pipeline counts from 0.

        Returns:
            The guided velocity, of the same shape.
        """
        return classifier_free_guidance(positive, negative, scale)

    def teacher_routing(self, config: Mapping[str, Any]) -> TeacherRouting:
        """Tell which networks a pipeline runs where.

        Args:
            config: The pipeline's configuration (``model_index.json``).

        Returns:
            One network by default.
        """
        return TeacherRouting()

    def blocks_of(self, network: nn.Module) -> list[nn.Module]:
        """List the repeated blocks of a network, which are sharded, quantised and compiled one by one.

        Args:
            network: An instance of ``architecture``.

        Returns:
            The blocks of all lists in ``blocks``.
        """
        return [block for name in self.blocks for block in network.get_submodule(name).children()]

    # --- the pipeline --------------------------------------------------------

    @abstractmethod
    def encode_prompts(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        max_sequence_length: int,
        images: Sequence[Image] | None = None,
    ) -> dict[str, Tensor]:
        """Encode prompts exactly as the pipeline's own call does.

        Args:
            pipeline: A pipeline with its text encoder.
            prompts: The texts.
            max_sequence_length: As in the pipeline's call.
            images: One for each prompt, where the text encoder sees them (``prompts_see_images``).

        Returns:
            Conditioning with a row for each prompt. It may have fewer tokens than ``max_sequence_length`` if zeros
            after them change nothing, which a tensor ``prompt_mask`` of shape (batch, tokens) says. Only names that
            start with ``prompt_`` are of shape (batch, tokens, ...).
        """

    @abstractmethod
    def conditioning_shapes(
        self, config: Mapping[str, Any], tokens: int, latent: Sequence[int]
    ) -> dict[str, tuple[int, ...]]:
        """Tell the shapes of one example's conditioning, as far as the network's configuration tells them.

        Args:
            config: The network's ``config.json``.
            tokens: Tokens of the prompt.
            latent: The sample's ``latent_shape``.

        Returns:
            The shapes without the batch, by the names of ``encode_prompts`` and ``encode_images``.
        """

    @abstractmethod
    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        """Decode latents as the pipeline's own call does.

        Args:
            pipeline: A pipeline with its autoencoder.
            latents: What was sampled, of shape (batch, *latent_shape).

        Returns:
            Pixels in [0, 1] of shape (batch, frames, 3, height, width).
        """

    def guidance_arguments(self, scale: float, pipeline: type[DiffusionPipeline] | None = None) -> dict[str, float]:
        """Say in the words of the pipeline's call how it is to guide.

        Guidance that is an input of a guidance-distilled network, as FLUX's ``guidance_scale``, is not meant: it is no
        classifier-free guidance and stays as the pipeline has it.

        Args:
            scale: The scale, counted so that 1 is none.
            pipeline: The class whose call is meant, where the pipelines of the family differ.

        Returns:
            Keyword arguments of the call: for Z-Image and scale 1, ``{"guidance_scale": 0.0}``; none where a component
            guides.

        Raises:
            ValueError: If the pipeline has no such guidance.
        """
        return {} if self.guider else {self.guidance_argument: scale - 1.0 + self.unguided}

    def guiders(self, scale: float = 1.0) -> dict[str, ClassifierFreeGuidance]:
        """Make the components of a pipeline that guide, where its call has no argument for it.

        Args:
            scale: The scale, counted so that 1 is none.

        Returns:
            Components by name; none for most pipelines.
        """
        if self.guider is None:
            return {}
        from diffusers import ClassifierFreeGuidance

        return {self.guider: ClassifierFreeGuidance(guidance_scale=scale)}

    def stock_routing(self, plan: PhasePlan, components: Sequence[str]) -> dict[str, Any]:
        """Make the stock pipeline run each phase on a network of its own choice.

        Args:
            plan: The phases of the experts.
            components: The network of the pipeline for each phase.

        Returns:
            Entries of ``model_index.json``; none for pipelines that have one network.

        Raises:
            ValueError: If the stock pipeline cannot do that.
        """
        if set(components) == {"transformer"}:
            return {}
        raise ValueError(f"a stock pipeline of {self.name} holds one network, these experts take {len(components)}")

    # --- ComfyUI -------------------------------------------------------------

    def native_weight_name(self, diffusers_name: str) -> str:
        """Find the name of any of the network's weights in the native layout, which ComfyUI loads.

        Args:
            diffusers_name: Its name in diffusers.

        Returns:
            The name in the native layout.

        Raises:
            ValueError: If the weight has no counterpart there, or only as a part of one (``native_layout``).
        """
        raise ValueError(f"{diffusers_name!r} has no weight of its own in the native layout of {self.title}")

    def native_weights(self, names: Collection[str]) -> list[NativeWeight]:
        """Find all weights of the native layout, which ComfyUI loads.

        Args:
            names: All weights of the network in diffusers.

        Returns:
            The native weights, each with those of diffusers that it is made of.

        Raises:
            ValueError: If a weight has no counterpart there, or if a part of a native weight is missing.
        """
        if self.native_layout is None:
            return [NativeWeight(self.native_weight_name(name), (name,)) for name in names]
        return self.native_layout.whole(names)

    def comfyui_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Tell what ComfyUI would guess wrong about a network.

        Args:
            config: The network's ``config.json``.

        Returns:
            Settings under ComfyUI's names; none for released sizes.
        """
        return {}

    def native_autoencoder(self, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring an autoencoder into the native layout, which ComfyUI loads.

        Args:
            config: Its ``config.json``.
            state: Its weights by their names in diffusers.

        Returns:
            The weights by their native names.

        Raises:
            ValueError: If it is not converted.
        """
        raise ValueError(f"the autoencoder of {self.title} is not converted from diffusers' layout for ComfyUI")
