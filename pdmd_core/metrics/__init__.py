"""Measures of samples: distance to a reference, diversity over seeds, prompt agreement and motion.

Every measure takes features or pixels as tensors and returns a number, or a dataclass with its confidence interval.
"""

from .agreement import prompt_agreement
from .clips import clip_features, flow_statistics, over_time, standardised
from .diversity import cosine_distance, euclidean_distance, pairwise_distance, seed_diversity
from .extractors import DinoV3, EffLite0, Extractor, extract
from .frechet import frechet_distance, frechet_estimate
from .intervals import CorrectedEstimate, Estimate, bootstrap, bootstrap_corrected, mean_of_units, share
from .kernel import KernelDistance, kernel_distance, kernel_estimate, polynomial_discrepancy
from .manifold import Manifold, manifold
from .motion import Motion, flow_length, is_dynamic, motion, optical_flow, smoothness
from .perceptual import AlexLpips, perceptual_distance
from .preference import ImageReward

__all__ = [
    "AlexLpips",
    "CorrectedEstimate",
    "DinoV3",
    "EffLite0",
    "Estimate",
    "Extractor",
    "ImageReward",
    "KernelDistance",
    "Manifold",
    "Motion",
    "bootstrap",
    "bootstrap_corrected",
    "clip_features",
    "cosine_distance",
    "euclidean_distance",
    "extract",
    "flow_length",
    "flow_statistics",
    "frechet_distance",
    "frechet_estimate",
    "is_dynamic",
    "kernel_distance",
    "kernel_estimate",
    "manifold",
    "mean_of_units",
    "motion",
    "optical_flow",
    "over_time",
    "pairwise_distance",
    "perceptual_distance",
    "polynomial_discrepancy",
    "prompt_agreement",
    "seed_diversity",
    "share",
    "smoothness",
    "standardised",
]
