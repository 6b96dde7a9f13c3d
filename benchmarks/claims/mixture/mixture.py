"""A mixture of Gaussians with unequal weights: a teacher without error and a truth known exactly.

``GaussianMixture`` is data and teacher at once: the velocity of its marginals has a closed form at every sigma, and so
has the distance of samples to it (the samples' side is the only one that is estimated).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdmd_core.flow import Sigma, like

BANDWIDTHS = (0.8, 0.4, 0.2, 0.1)
"""Of the Gaussian kernels in the kernel distance: from between modes to within one. Each is half the one before.
In more than two dimensions they grow as distances do, with the root of the dimension."""
_ROWS = 200
"""Rows of the kernel matrix at a time."""
OFF_MODE = 4.0
"""A sample this many standard deviations from every centre is on no mode; of exact samples exp(-8) = 0.03 % are."""


@dataclass(frozen=True)
class GaussianMixture:
    """Isotropic Gaussians: weights (modes,), centres (modes, dimensions), standard deviations (modes,)."""

    weights: Tensor
    centres: Tensor
    deviations: Tensor

    @classmethod
    def ring(cls) -> GaussianMixture:
        """Eight modes on a ring whose weights fall from 0.26 to 0.02; about unit variance in each dimension."""
        weights = torch.tensor([0.26, 0.04, 0.16, 0.08, 0.20, 0.02, 0.14, 0.10])
        angles = torch.arange(8) * (2 * math.pi / 8)
        centres = 1.4 * torch.stack([angles.cos(), angles.sin()], dim=1)
        deviations = torch.tensor([0.08, 0.12, 0.08, 0.12, 0.08, 0.12, 0.08, 0.12])
        return cls(weights, centres, deviations)

    @property
    def dimensions(self) -> int:
        """Of the space."""
        return self.centres.shape[1]

    def marginal(self, sigma: float) -> GaussianMixture:
        """The distribution of ``x_sigma = (1 - sigma) x_0 + sigma noise``: a mixture again."""
        deviations = ((1 - sigma) ** 2 * self.deviations.square() + sigma**2).sqrt()
        return GaussianMixture(self.weights, (1 - sigma) * self.centres, deviations)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Exact samples, shape (count, dimensions)."""
        modes = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        return self.centres[modes] + self.deviations[modes, None] * torch.randn(
            count, self.dimensions, generator=generator
        )

    def velocity(self, x: Tensor, sigma: Sigma) -> Tensor:
        """``E[noise - x_0 | x_sigma = x]`` of x (batch, dimensions), exactly; sigma in (0, 1], a number or (batch,)."""
        sigma = like(sigma, x)
        alpha = 1 - sigma
        # shapes (batch, modes): variance of x_sigma in each mode, and how likely each mode is
        variance = alpha.square() * self.deviations.square() + sigma.square()
        offset = x[:, None] - alpha.reshape(-1, 1, 1) * self.centres
        half = self.dimensions / 2
        share = (self.weights.log() - half * variance.log() - offset.square().sum(-1) / (2 * variance)).softmax(-1)
        slope = (sigma - alpha * self.deviations.square()) / variance
        return (share[..., None] * (slope[..., None] * offset - self.centres)).sum(1)

    def nearest_mode(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """For each sample the mode that is nearest in standard deviations, and how many it is away."""
        distance = torch.cdist(samples, self.centres) / self.deviations
        away, mode = distance.min(dim=1)
        return mode, away


def kernel_distance_to_exact(samples: Tensor, mixture: GaussianMixture) -> float:
    """Squared maximum mean discrepancy between samples (count, dimensions) and the mixture itself, unbiased.

    ``E k(x, x') - 2 E k(x, y) + E k(y, y')`` with k the mean of Gaussian kernels ``exp(-|x - y|^2 / (2 h^2))``, h in
    BANDWIDTHS (Gretton et al. 2012, JMLR 13). Terms with the mixture are integrals of Gaussians, hence exact; 0 in
    expectation for exact samples, slightly below 0 as often as above.
    """
    weights, centres = mixture.weights.double(), mixture.centres.double()
    variance = mixture.deviations.double().square()
    between = torch.cdist(centres, centres).square()
    to_centres = torch.cdist(samples.double(), centres).square()
    half = mixture.dimensions / 2
    bandwidths = [h * half**0.5 for h in BANDWIDTHS]
    among = _mean_kernels(samples.float(), bandwidths[0])
    total = 0.0
    for h, kernel in zip(bandwidths, among, strict=True):
        both = h**2 + variance[:, None] + variance
        truth = weights @ ((h**2 / both) ** half * (-between / (2 * both)).exp()) @ weights
        one = h**2 + variance
        cross = (((h**2 / one) ** half * (-to_centres / (2 * one)).exp()) @ weights).mean()
        total += kernel + float(truth - 2 * cross)
    return total / len(BANDWIDTHS)


def _mean_kernels(samples: Tensor, widest: float) -> list[float]:
    """Mean of the kernel of each bandwidth over pairs of different samples."""
    count = len(samples)
    lengths = samples.square().sum(1)
    sums = torch.zeros(len(BANDWIDTHS), dtype=torch.float64)
    buffer = torch.empty(min(_ROWS, count), count)
    for start in range(0, count, _ROWS):
        rows = samples[start : start + _ROWS]
        kernel = torch.matmul(rows, samples.T, out=buffer[: len(rows)])
        kernel.mul_(-2).add_(lengths).add_(lengths[start : start + _ROWS, None])
        kernel.clamp_(min=0).div_(-2 * widest**2).exp_().diagonal(start).zero_()
        for i in range(len(BANDWIDTHS)):
            if i:  # half the bandwidth is the fourth power
                kernel.square_().square_()
            sums[i] += kernel.sum()
    return [float(value) / (count * (count - 1)) for value in sums]


def mode_weight_error(samples: Tensor, mixture: GaussianMixture) -> float:
    """Total variation between the samples' shares of the modes and the true weights: the share in a wrong mode."""
    mode, _ = mixture.nearest_mode(samples)
    shares = F.one_hot(mode, len(mixture.weights)).float().mean(0)
    return float((shares - mixture.weights).abs().sum() / 2)


def share_off_modes(samples: Tensor, mixture: GaussianMixture) -> float:
    """Share of samples more than OFF_MODE standard deviations away from every centre."""
    return float((mixture.nearest_mode(samples)[1] > OFF_MODE).float().mean())


def variance_in_modes(samples: Tensor, mixture: GaussianMixture) -> float:
    """Variance of the samples about their nearest centre in units of that mode's own, of samples on a mode.

    1 for exact samples (0.997 in the plane, as OFF_MODE cuts the tails off); less when modes shrink, the loss of
    diversity that the shares of the modes do not show.
    """
    _, away = mixture.nearest_mode(samples)
    on = away <= OFF_MODE
    return float(away[on].square().mean() / mixture.dimensions) if bool(on.any()) else math.nan


class VelocityNetwork(nn.Module):
    """A multilayer perceptron of (x, sigma); every expert and every fake is one, started from the same weights."""

    FREQUENCIES = (1.0, 2.0, 4.0)

    def __init__(self, width: int = 128, dimensions: int = 2) -> None:
        super().__init__()
        inputs = dimensions + 1 + 2 * len(self.FREQUENCIES)
        self.body = nn.Sequential(
            nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.head = nn.Linear(width, dimensions)

    def forward(self, x: Tensor, sigma: Sigma) -> Tensor:
        column = like(sigma, x).expand(len(x), 1)
        angles = math.pi * column * torch.tensor(self.FREQUENCIES, device=x.device)
        return self.head(self.body(torch.cat([x, column, angles.sin(), angles.cos()], dim=1)))
