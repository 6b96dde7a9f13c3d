"""Phased experts in diffusers pipelines.

Three lines:

    from pdmd_core.pipelines import load_phased_pipeline
    pipe = load_phased_pipeline("user/experts")
    pictures = pipe("a panda on a blue background").images
"""

from .attach import attach_experts, detach_experts
from .load import load_phased_pipeline
from .phased import PhasedPipeline

__all__ = ["PhasedPipeline", "attach_experts", "detach_experts", "load_phased_pipeline"]
