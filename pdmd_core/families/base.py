"""What the rest of the project asks of a model family; each family is one file beside this one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..flow import Sigma
from ..phases import PhasePlan

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Conditioning = Mapping[str, Tensor]
"""Named conditioning tensors, each of shape (batch, ...): ``{"prompt_embeds": (batch, tokens, features)}``."""


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

    @abstractmethod
    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], max_sequence_length: int
    ) -> dict[str, Tensor]:
        """Conditioning of these prompts, exactly as the pipeline's own call computes it."""

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
