"""What the tests of all families ask of a tiny random pipeline; each family has its cases in a file beside this one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from pdmd_core.families import ModelFamily, known_family
from tests.helpers.families.parts import picture
from tests.helpers.tiny import randn

PROMPT = "a panda"
Velocity = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor, Tensor], Tensor]
"""Network, arguments of a call of the stock pipeline, x, timestep (sigma * 1000, float32) to the velocity at x."""


def plain(network: nn.Module, args: Any, kwargs: dict[str, Any], x: Tensor, timestep: Tensor) -> Tensor:
    """Of a network that takes latents and timesteps as they are."""
    return network(*args, **{**kwargs, "hidden_states": x, "timestep": timestep})[0]


def thousandth(network: nn.Module, args: Any, kwargs: dict[str, Any], x: Tensor, timestep: Tensor) -> Tensor:
    """Of a network whose timestep is sigma."""
    return plain(network, args, kwargs, x, timestep / 1000)


def _as_they_are(pipeline: Any, latents: Tensor, size: tuple[int, int, int]) -> Tensor:
    return latents


@functools.cache
def _arguments(build: Callable[..., Any]) -> frozenset[str]:
    """Of the pipeline's call."""
    return frozenset(inspect.signature(type(build()).__call__).parameters)


@dataclass(frozen=True)
class Case:
    """A pipeline of the real classes with random weights, and what cannot be read off it or its family."""

    build: Callable[..., Any]
    """Makes the pipeline; equal weights every time."""
    size: tuple[int, int, int]
    """Height, width and frames of a small sample; sides that differ, where the model has them."""
    latents: tuple[int, ...]
    """Shape of what the pipeline's call takes as ``latents``."""
    velocity: Velocity | None = plain
    """How the pipeline calls its network; None where its loop is more than Euler steps over all of the latents."""
    tokens: int = 16
    """As max_sequence_length; enough for the prompts of the tests."""
    unpacked: Callable[[Any, Tensor, tuple[int, int, int]], Tensor] = _as_they_are
    """Pipeline, latents as its call returns them, size, to latents as the family has them."""
    no_guidance: Mapping[str, float] | None = None
    """Arguments of the call for no guidance, of pipelines that are of no family."""
    name: str = ""
    """In the CASES of its module."""

    def family(self, pipe: DiffusionPipeline) -> ModelFamily | None:
        """The family of a pipeline that this case built."""
        return known_family(type(getattr(pipe.transformer, "_orig_mod", pipe.transformer)).__name__)

    @property
    def call(self) -> dict[str, Any]:
        """A small call of the pipeline."""
        height, width, frames = self.size
        takes = _arguments(self.build)
        values = {
            "prompt": PROMPT,
            "image": picture(),
            "height": height,
            "width": width,
            "num_frames": frames,
            "max_sequence_length": self.tokens,
        }
        return {name: value for name, value in values.items() if name in takes}

    def unguided(self, pipe: DiffusionPipeline) -> Mapping[str, float]:
        """Arguments of the call for no guidance."""
        if self.no_guidance is not None:
            return self.no_guidance
        found = self.family(pipe)
        assert found is not None
        return found.guidance_arguments(1.0)

    def noise(self, seed: int = 5) -> Tensor:
        """Normal noise of the shape of the call's latents."""
        return randn(*self.latents, seed=seed)

    def sample(self, pipe: DiffusionPipeline, **arguments: Any) -> Tensor:
        """Latents that the pipeline makes from ``noise()``."""
        call = {**self.call, "latents": self.noise(), "output_type": "latent", "return_dict": False, **arguments}
        return pipe(**call)[0]
