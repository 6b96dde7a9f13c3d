"""What is measured of each sample once and kept: features, motion, a preview. Metrics are computed from these.

A measure turns a batch of samples into rows of named tensors, one row a sample.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pdmd_core.hashing import digest_of
from pdmd_core.metrics import (
    AlexLpips,
    DinoV3,
    EffLite0,
    Extractor,
    ImageReward,
    extract,
    flow_length,
    flow_statistics,
    is_dynamic,
    optical_flow,
    over_time,
    smoothness,
)
from pdmd_core.metrics.extractors import EFFLITE0_SHA256
from training.config.command_line import UserError
from training.embedded.features import FOLDER, load_features, see
from training.evaluation.identity import FileHashes

FRAMES = 16
"""At most this many frames of a clip, evenly spaced, are looked at one by one: features and previews."""
PREVIEW = 256
"""Previews are at most this large on the shorter side, in pixels."""
EMOJI_SIDE = 64
"""Width and height of the pictures of the embedded data, in pixels."""
FEATURE_SPACES = ("emoji", "efflite0", "dinov3")
"""Names of the networks that features are taken from."""


@dataclass(frozen=True)
class Pixels:
    """A batch of samples."""

    all: Tensor
    """Pixels in [0, 1] of shape (count, frames, 3, height, width)."""
    prompts: Sequence[str] = ()
    """The prompt of each; none of real pictures and clips."""

    @property
    def is_clip(self) -> bool:
        """Whether samples have several frames."""
        return self.all.shape[1] > 1

    @cached_property
    def some(self) -> Tensor:
        """At most ``FRAMES`` of the frames, evenly spaced, first and last among them."""
        count = self.all.shape[1]
        return self.all[:, torch.linspace(0, count - 1, min(count, FRAMES)).round().long()]


class Measure(Protocol):
    """What turns samples into rows of named tensors."""

    name: str
    """A word for the names of folders."""
    identity: str
    """A hash of everything that the rows depend on, but the samples."""

    def __call__(self, pixels: Pixels) -> dict[str, Tensor]:
        """Measure a batch of samples.

        Args:
            pixels: The samples.

        Returns:
            Tensors by name, one row a sample.
        """
        ...


class FeatureSpace(Measure, Protocol):
    """A measure whose rows hold features that distances and diversity are computed in.

    The rows are ``features`` for distances; ``layout``, which tells what is where, for diversity and coverage, where it
    differs; ``clip``, mean and deviation of the features over time, of clips; ``seen``, classes, if it classifies.
    """

    label: str
    """What distances in it are called after."""
    cosine: bool
    """Whether diversity is measured by the angle between features, otherwise by their distance."""


class EmojiSpace:
    """Features of the classifier of the embedded data, for samples of 64x64 pixels."""

    name, label, cosine = "emoji", "Emoji", False

    def __init__(self, hashes: FileHashes) -> None:
        self.network, self.emoji, self.backgrounds = load_features()
        self.identity = digest_of(1, hashes.of_folder(FOLDER))

    def __call__(self, pixels: Pixels) -> dict[str, Tensor]:
        """Classify the samples and take their features."""
        found = see(self.network, pixels.all)
        rows = {
            "features": found.style,
            "layout": found.layout,
            "seen": torch.stack([found.emoji, found.background], dim=1),
        }
        if pixels.is_clip:
            frames = see(self.network, pixels.all.flatten(0, 1)[:, None]).style.unflatten(0, pixels.all.shape[:2])
            rows["clip"] = over_time(frames)
        return rows


class NetworkSpace:
    """Features of a network for any pictures; those of a clip are averaged over frames.

    Args:
        name: A word for the names of folders.
        extractor: The network.
        identity: A hash of its weights.
        device: Where it runs.
    """

    cosine = True

    def __init__(self, name: str, extractor: Extractor, identity: str, device: torch.device) -> None:
        self.name, self.label = name, extractor.name
        self.extractor, self.device = extractor, device
        self.identity = digest_of(1, name, identity, FRAMES)

    def __call__(self, pixels: Pixels) -> dict[str, Tensor]:
        """Take the features of the samples."""
        frames = torch.stack([extract(self.extractor, sample.to(self.device)).cpu() for sample in pixels.some])
        rows = {"features": frames.double().mean(1)}
        if pixels.is_clip:
            rows["clip"] = over_time(frames)
        return rows


class MotionMeasure:
    """Optical flow of clips.

    The rows are ``flow``, its mean length in pixels a frame; ``dynamic``, whether something moves fast; ``smoothness``
    in [0, 1], NaN for clips of two frames; and ``statistics`` of the flow for a Frechet distance of clips.
    """

    name = "motion"
    identity = digest_of(1)

    def __call__(self, pixels: Pixels) -> dict[str, Tensor]:
        """Compute the optical flow of the clips."""
        flow = optical_flow(pixels.all)
        smooth = smoothness(pixels.all) if pixels.all.shape[1] > 2 else torch.full((len(flow),), torch.nan)
        return {
            "flow": flow_length(flow).flatten(1).mean(1).double(),
            "dynamic": is_dynamic(flow),
            "smoothness": smooth.double(),
            "statistics": flow_statistics(flow),
        }


class RewardMeasure:
    """Rewards ``reward`` (count,) by ImageReward, of a clip the mean over frames.

    Args:
        network: ImageReward.
        identity: A hash of its files.
    """

    name = "image_reward"

    def __init__(self, network: ImageReward, identity: str) -> None:
        self.network, self.identity = network, digest_of(1, identity, FRAMES)

    def __call__(self, pixels: Pixels) -> dict[str, Tensor]:
        """Reward the samples for what their prompts ask for."""
        rewards = [
            self.network(sample, [prompt] * len(sample)).mean()
            for sample, prompt in zip(pixels.some, pixels.prompts, strict=True)
        ]
        return {"reward": torch.stack(rewards).cpu().double()}


class Preview:
    """Small 8-bit pictures ``frames`` (count, frames, 3, height, width), for people to look at and for LPIPS."""

    name = "preview"
    identity = digest_of(1, FRAMES, PREVIEW)

    def __call__(self, pixels: Pixels) -> dict[str, Tensor]:
        """Scale the samples down."""
        small = shrunk(pixels.some.flatten(0, 1), PREVIEW).unflatten(0, pixels.some.shape[:2])
        return {"frames": (small * 255).round().byte()}


def shrunk(pixels: Tensor, side: int) -> Tensor:
    """Scale pictures down.

    Args:
        pixels: Pictures in [0, 1] of shape (count, 3, height, width).
        side: The largest length of the shorter side, in pixels.

    Returns:
        The pictures, unchanged where they are small enough.
    """
    height, width = pixels.shape[-2:]
    if min(height, width) <= side:
        return pixels
    size = (round(height * side / min(height, width)), round(width * side / min(height, width)))
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)


def load_space(name: str, dino_weights: Path | None, hashes: FileHashes, device: torch.device) -> FeatureSpace:
    """Load a network that features are taken from.

    Args:
        name: One of ``FEATURE_SPACES``.
        dino_weights: Folder of a DINOv3 model, for ``dinov3``.
        hashes: Remembers the hashes of weight files.
        device: Where the network runs.

    Raises:
        UserError: When its weights are not there, or are not those of such a network.
    """
    try:
        if name == "emoji":
            return EmojiSpace(hashes)
        if name == "efflite0":
            return NetworkSpace("efflite0", EffLite0.load().to(device), EFFLITE0_SHA256, device)
        if name == "dinov3":
            if dino_weights is None:
                raise UserError("--features dinov3 needs --dino_weights FOLDER: a DINOv3 model that you downloaded")
            dino = DinoV3(dino_weights)
            dino.network.to(device)
            return NetworkSpace("dinov3", dino, hashes.of_folder(dino_weights), device)
    except (ValueError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"--features {name}: {' '.join(str(error).split())}") from None
    raise UserError(f"--features: unknown {name!r}, expected one of: {', '.join(FEATURE_SPACES)}")


def load_image_reward(folder: Path, hashes: FileHashes, device: torch.device) -> RewardMeasure:
    """Load ImageReward, which tells what people would prefer.

    Args:
        folder: Where ImageReward.pt and vocab.txt are.
        hashes: Remembers the hashes of weight files.
        device: Where the network runs.

    Raises:
        UserError: When the files are not there, or are another network's.
    """
    try:
        network = ImageReward.from_folder(folder).to(device)
        return RewardMeasure(network, digest_of(*(hashes(folder / name) for name in ImageReward.FILES)))
    except (ValueError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"--image_reward: {' '.join(str(error).split())}") from None


def load_lpips(backbone: Path, heads: Path, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Load LPIPS, the distance of pairs of pictures.

    Args:
        backbone: AlexNet of torchvision.
        heads: The linear heads of lpips 0.1.
        device: Where the networks run.

    Returns:
        A function of two batches (pairs, 3, height, width) in [0, 1] that returns distances (pairs,).

    Raises:
        UserError: When the files are not these weights.
    """
    try:
        network = AlexLpips.from_files(backbone, heads).to(device)
    except Exception as error:  # what unpickling of another file trips over can be anything
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"--lpips_weights: expected alexnet-owt-7be5be79.pth of torchvision and alex.pth of lpips 0.1, found "
            f"{backbone} and {heads} ({found})"
        ) from None
    return lambda first, second: network(first.to(device), second.to(device))


def wanted_classes(prompts: Sequence[str], emoji: Sequence[str], backgrounds: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Find which classes each prompt names.

    Args:
        prompts: The prompts, "SUBJECT on a BACKGROUND".
        emoji: Names of the classes of subjects.
        backgrounds: Names of the classes of backgrounds.

    Returns:
        Indices of the emoji and of the background, each of shape (prompts,); -1 where a prompt names none.
    """

    def find(text: str, names: Sequence[str]) -> int:
        return next((i for i, name in enumerate(names) if name in text), -1)

    parts = [prompt.rpartition(" on a ") for prompt in prompts]
    return (
        torch.tensor([find(subject, emoji) for subject, _, _ in parts]),
        torch.tensor([find(place, backgrounds) for _, _, place in parts]),
    )


def all_name_emoji(prompts: Sequence[str]) -> bool:
    """Whether all prompts name an emoji and a background of the embedded data."""
    _, emoji, backgrounds = load_features()
    return all(bool((found >= 0).all()) for found in wanted_classes(prompts, emoji, backgrounds))
