"""Expert files: the manifest, the weights, the model card."""

from .files import PhasedExperts, lora_from_file, lora_to_file, write_experts
from .manifest import MANIFEST_NAME, BaseModel, Expert, ExpertsError, Manifest, read_manifest

__all__ = [
    "MANIFEST_NAME",
    "BaseModel",
    "Expert",
    "ExpertsError",
    "Manifest",
    "PhasedExperts",
    "lora_from_file",
    "lora_to_file",
    "read_manifest",
    "write_experts",
]
