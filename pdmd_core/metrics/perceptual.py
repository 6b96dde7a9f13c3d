"""LPIPS (Zhang et al. 2018, arXiv 1801.03924) with weights that the user gives."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

_SHIFT = (-0.030, -0.088, -0.188)
"""Mean of the colour channels in [-1, 1], as the published network expects."""
_SCALE = (0.458, 0.448, 0.450)
"""Standard deviation of the colour channels in [-1, 1]."""


def perceptual_distance(first: list[Tensor], second: list[Tensor], heads: list[Tensor]) -> Tensor:
    """Compute LPIPS from feature maps.

    The distance is ``sum over layers of mean over places of sum over channels of w_c (x_c / |x| - y_c / |y|)^2``.
    Source: Zhang et al. 2018, arXiv 1801.03924, equation 1, with the published heads as ``w_c``.

    Args:
        first: Feature maps x of shape (pairs, channels, height, width), one for each layer.
        second: Feature maps y of the same shapes.
        heads: The weights w of each layer, of shape (channels,).

    Returns:
        Distances of shape (pairs,).
    """
    total = torch.zeros(len(first[0]), device=first[0].device)
    for x, y, head in zip(first, second, heads, strict=True):
        difference = x / (x.norm(dim=1, keepdim=True) + 1e-10) - y / (y.norm(dim=1, keepdim=True) + 1e-10)
        total = total + (difference.square() * head.view(1, -1, 1, 1)).sum(1).mean((1, 2))
    return total


class AlexLpips(nn.Module):
    """LPIPS of version 0.1 on AlexNet.

    Neither the backbone nor the heads are part of this project or downloaded by it.

    Args:
        backbone: The state dict of torchvision's AlexNet (alexnet-owt-7be5be79.pth).
        heads: The state dict of the linear heads (alex.pth, which the package ``lpips`` carries in weights/v0.1).

    Raises:
        ValueError: If the state dicts are those of other networks.
    """

    def __init__(self, backbone: dict[str, Tensor], heads: dict[str, Tensor]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU()),
                nn.Sequential(nn.MaxPool2d(3, stride=2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()),
                nn.Sequential(nn.MaxPool2d(3, stride=2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
                nn.Sequential(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
                nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
            ]
        )
        convolutions = [layer for layer in self.stages.modules() if isinstance(layer, nn.Conv2d)]
        try:
            for convolution, place in zip(convolutions, (0, 3, 6, 8, 10), strict=True):
                convolution.load_state_dict({k: backbone[f"features.{place}.{k}"] for k in ("weight", "bias")})
            weights = [heads[f"lin{i}.model.1.weight"].float() for i in range(5)]
        except (KeyError, RuntimeError) as error:
            found = " ".join(str(error).split())
            raise ValueError(f"LPIPS needs torchvision's AlexNet and the alex heads of lpips 0.1: {found}") from None
        channels = [convolution.out_channels for convolution in convolutions]
        if [weight.numel() for weight in weights] != channels:
            raise ValueError(f"the heads have {channels} weights, found {[weight.numel() for weight in weights]}")
        self.heads = [weight.flatten() for weight in weights]
        self.eval().requires_grad_(False)

    @classmethod
    def from_files(cls, backbone: Path, heads: Path) -> AlexLpips:
        """Load both state dicts from files; nothing but tensors is ever unpickled.

        Args:
            backbone: The file of torchvision's AlexNet.
            heads: The file of the linear heads.

        Returns:
            The network, frozen and in evaluation mode.

        Raises:
            ValueError: If the files are those of other networks.
        """
        return cls(*(torch.load(path, map_location="cpu", weights_only=True) for path in (backbone, heads)))

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Compute the feature maps of the five stages.

        Args:
            pixels: Pictures of shape (count, 3, height, width), in [0, 1], of at least 64 pixels a side.

        Returns:
            One map of shape (count, channels, height, width) for each stage.

        Raises:
            ValueError: If the pictures have another shape.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or min(pixels.shape[-2:]) < 64:
            raise ValueError(f"expected pixels (count, 3, height >= 64, width >= 64), found {tuple(pixels.shape)}")
        shift, scale = (torch.tensor(value, device=pixels.device).view(3, 1, 1) for value in (_SHIFT, _SCALE))
        x = (2 * pixels.float() - 1 - shift) / scale
        return [x := stage(x) for stage in self.stages]

    @torch.no_grad()
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Compute the distances of pairs of pictures.

        Args:
            first: Pictures of shape (pairs, 3, height, width), in [0, 1], of at least 64 pixels a side.
            second: Pictures of the same shape.

        Returns:
            Distances of shape (pairs,).
        """
        return perceptual_distance(self.maps(first), self.maps(second), [head.to(first.device) for head in self.heads])
