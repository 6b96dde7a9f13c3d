"""Gaussian data, and networks that are exact for it."""

import torch
from torch import Tensor, nn

MEAN = torch.tensor([2.0, -1.0], dtype=torch.float64)
STD = torch.tensor([0.5, 1.5], dtype=torch.float64)


class GaussianVelocity(nn.Module):
    """The velocity of Gaussian data at every noise level; mean and variance are weights. Teacher and fake."""

    def __init__(self, std: Tensor = STD) -> None:
        super().__init__()
        self.mean, self.log_variance = nn.Parameter(MEAN.clone()), nn.Parameter(2 * std.log())

    def forward(self, x, sigma):
        t = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1)
        variance = self.log_variance.exp()
        marginal = (1 - t) ** 2 * variance + t**2
        return (t - (1 - t) * variance) / marginal * (x - (1 - t) * self.mean) - self.mean


class LinearVelocity(nn.Module):
    """slope * x + offset of each sigma: all that an expert needs. Starts as the teacher at its sigmas."""

    def __init__(self, teacher: GaussianVelocity, sigmas: tuple[float, ...]) -> None:
        super().__init__()
        self.sigmas, at = sigmas, torch.tensor(sigmas, dtype=torch.float64)
        with torch.no_grad():
            offset = teacher(torch.zeros(len(at), 2, dtype=torch.float64), at)
            slope = teacher(torch.ones(len(at), 2, dtype=torch.float64), at) - offset
        self.slope, self.offset = nn.Parameter(slope), nn.Parameter(offset)

    def forward(self, x, sigma):
        step = self.sigmas.index(sigma)
        return self.slope[step] * x + self.offset[step]


def error(found: tuple[Tensor, Tensor], mean: Tensor, std: Tensor) -> float:
    """Largest deviation of a mean or a standard deviation, relative to the standard deviation."""
    return max(((found[0] - mean) / std).abs().max().item(), (found[1] / std - 1).abs().max().item())


def marginal_of_data(sigma: float) -> tuple[Tensor, Tensor]:
    return (1 - sigma) * MEAN, ((1 - sigma) ** 2 * STD.square() + sigma**2).sqrt()
