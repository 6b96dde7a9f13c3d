"""Measures of samples: distance to a reference distribution, diversity over seeds."""

from .diversity import pairwise_distance
from .frechet import frechet_distance

__all__ = ["frechet_distance", "pairwise_distance"]
