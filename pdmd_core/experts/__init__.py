"""Expert files: the manifest, the weights, the model card."""

from .errors import ExpertsError
from .folder import PhasedExperts, write_experts
from .format.lora_keys import lora_from_file, lora_to_file
from .format.manifest import MANIFEST_NAME, BaseModel, Expert, Manifest, read_manifest

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
