"""What the tests of all families ask of a tiny random pipeline; each family has its cases in a file beside this one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
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


def beside_tokens(network: nn.Module, args: Any, kwargs: dict[str, Any], x: Tensor, timestep: Tensor) -> Tensor:
    """Of a network that is given tokens of a picture after those of the sample."""
    states = torch.cat([x, kwargs["hidden_states"][:, x.shape[1] :]], dim=1)
    return thousandth(network, args, kwargs, states, timestep)[:, : x.shape[1]]


def _as_they_are(pipeline: Any, latents: Tensor, size: tuple[int, int, int]) -> Tensor:
    return latents


@functools.cache
def _told(build: Callable[..., Any]) -> tuple[ModelFamily | None, frozenset[str], type[DiffusionPipeline]]:
    """The family of a pipeline, the arguments of its call that it is given here, and its class."""
    pipe = build()
    family, arguments = known_family(type(pipe.transformer).__name__), set(inspect.signature(pipe.__call__).parameters)
    return family, frozenset(arguments), type(pipe)


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
    prompt: str = PROMPT
    """A text all of whose conditioning matters."""
    tokens: int = 16
    """As max_sequence_length; enough for the prompts of the tests."""
    unpacked: Callable[[Any, Any, tuple[int, int, int]], Tensor] = _as_they_are
    """Pipeline, latents as its call returns them, size, to latents as the family has them."""
    outputs: int = 1
    """How many outputs of the call are latents."""
    picture_size: tuple[int, int] = (24, 40)
    """Width and height of the picture that the call is given, where it takes one."""
    edits: bool = False
    """Whether the call is given a picture that it can do without."""
    last_image: bool = False
    """Whether the call is given the picture that the clip ends with, too."""
    guided: bool = True
    """Whether the pipeline has classifier-free guidance."""
    no_guidance: Mapping[str, float] = field(default_factory=dict)
    """Arguments of the call for no guidance, of a pipeline that is of no family."""
    decoded_within: float = 1e-5
    """What decoding here and in the pipeline may differ by; larger samples are rounded in other blocks."""
    moved: float = 0.02
    """How far, at least, the small training of the tests moves a sample."""
    name: str = ""
    """In the CASES of its module."""

    @property
    def family(self) -> ModelFamily | None:
        """The family of the pipeline."""
        return _told(self.build)[0]

    @property
    def call(self) -> dict[str, Any]:
        """A small call of the pipeline."""
        height, width, frames = self.size
        values = {
            "prompt": self.prompt,
            "image": self.picture,
            "height": height,
            "width": width,
            "num_frames": frames,
            "max_sequence_length": self.tokens,
        }
        if self.last_image:
            values["last_image"] = self.last_picture
        return {name: value for name, value in values.items() if self.takes(name)}

    def takes(self, argument: str) -> bool:
        """Whether the pipeline's call has an argument, and is given it where it is a picture."""
        family, arguments, kind = _told(self.build)
        optional = argument == "image" and family is not None and not family.needs_image(kind)
        return argument in arguments and (self.edits or not optional)

    @property
    def picture(self) -> Image.Image:
        """What the call is given, where it takes a picture."""
        return picture(size=self.picture_size)

    @property
    def last_picture(self) -> Image.Image:
        """What the clip ends with, where the call is given it."""
        return picture(1, self.picture_size)

    @property
    def unguided(self) -> Mapping[str, float]:
        """Arguments of the call for no guidance."""
        return self.family.guidance_arguments(1.0, _told(self.build)[2]) if self.family else self.no_guidance

    def result(self, pipe: DiffusionPipeline, output: Any) -> Tensor:
        """Latents of the call's output, as the family has them."""
        return self.unpacked(pipe, output[0] if self.outputs == 1 else output[: self.outputs], self.size)

    def noise(self, seed: int = 5) -> Tensor:
        """Normal noise of the shape of the call's latents."""
        return randn(*self.latents, seed=seed)

    def guide(self, pipe: DiffusionPipeline, scale: float) -> dict[str, float]:
        """Arguments of the call for this guidance; where a component guides, it is set."""
        if self.family is None:
            return dict(self.no_guidance)
        for name, guider in self.family.guiders(scale).items():
            setattr(pipe, name, guider)
        return self.family.guidance_arguments(scale, type(pipe))

    def sample(self, pipe: DiffusionPipeline, **arguments: Any) -> Tensor:
        """Latents that the pipeline makes from ``noise()``."""
        call = {**self.call, "latents": self.noise(), "output_type": "latent", "return_dict": False, **arguments}
        return pipe(**call)[0]
