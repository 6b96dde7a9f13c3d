"""How the LoRA files of a family name their tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoraKeys:
    """How a family's LoRA files name their tensors, so that diffusers and ComfyUI both read them at strength 1.0."""

    prefix: str = "diffusion_model."
    """What comes before the native name of a module."""
    down: str = ".lora_down.weight"
    """What comes after it for the projection to the rank, of shape (rank, in)."""
    up: str = ".lora_up.weight"
    """What comes after it for the projection from the rank, of shape (out, rank)."""
    alpha: str | None = ".alpha"
    """What comes after it for alpha, a single number. None where the pipeline's own loader refuses such a tensor: the
    projection from the rank is then stored multiplied by alpha / rank, and the file's alpha is its rank."""

    def alpha_in_file(self, rank: int, alpha: float) -> float:
        """Tell the alpha by which the weights of a file count.

        Args:
            rank: The LoRA's rank.
            alpha: The LoRA's alpha in training.

        Returns:
            The alpha that the manifest says.
        """
        return float(alpha if self.alpha else rank)
