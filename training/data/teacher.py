"""Loading the parts of a teacher pipeline, only those that are needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import DiffusionPipeline
from torch import nn

from pdmd_core.families import ModelFamily, family_of
from training.config.command_line import UserError

TEXT_PARTS = ("text_encoder", "tokenizer", "processor", "connectors")
IMAGE_PARTS = ("image_encoder", "image_processor", "feature_extractor")
"""What the names of components start with that encode prompts, and images."""


class TeacherError(UserError):
    """A teacher that cannot be loaded: one line."""


@dataclass(frozen=True)
class TeacherSource:
    """Where a teacher is: a pipeline folder or Hub id, and its diffusers class if not the one that it names."""

    path: str
    revision: str | None = None
    pipeline: str | None = None

    def index(self) -> dict[str, Any]:
        """The pipeline's model_index.json. Raises TeacherError."""
        if ("/" not in self.path or self.path.startswith((".", "/"))) and not Path(self.path).is_dir():
            raise TeacherError(f"the teacher {self.path!r} is neither a folder with a diffusers pipeline nor a Hub id")
        try:
            return DiffusionPipeline.load_config(self.path, revision=self.revision)
        except (OSError, ValueError) as error:
            raise self.cannot_load(error) from None

    def network_config(self) -> dict[str, Any]:
        """The configuration of the (first) network. Raises TeacherError."""
        kind = getattr(diffusers, str((self.index().get("transformer") or [None, None])[1]), None)
        if kind is None:
            return {}
        try:
            found: dict[str, Any] = kind.load_config(self.path, subfolder="transformer", revision=self.revision)
        except (OSError, ValueError) as error:
            raise self.cannot_load(error) from None
        return found

    def pipeline_class(self) -> type[DiffusionPipeline]:
        """The class that samples with this teacher. Raises TeacherError."""
        name = self.index().get("_class_name") if self.pipeline is None else self.pipeline
        found = getattr(diffusers, str(name), None)
        if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
            raise TeacherError(
                f"the teacher {self.path!r}: {name!r} is not a pipeline class of diffusers {diffusers.__version__}"
            )
        if self.pipeline is not None:
            network = str((self.index().get("transformer") or [None, None])[1])
            taken = inspect.signature(found).parameters.get("transformer")
            if taken is None or network not in str(taken.annotation):
                raise TeacherError(f"the teacher {self.path!r}: {name} does not take its network, a {network}")
        return found

    def load(self, dtype: torch.dtype | Mapping[str, torch.dtype], wanted: Callable[[str], bool]) -> DiffusionPipeline:
        """The pipeline with those of its components whose names are wanted. Raises TeacherError.

        dtype: of all components, or by component with ``default``.
        """
        parts = [name for name, value in self.index().items() if isinstance(value, list)]
        absent = {name: None for name in parts if name != "scheduler" and not wanted(name)}
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        try:
            pipeline = self.pipeline_class().from_pretrained(self.path, revision=self.revision, dtype=dtype, **absent)
        except (OSError, ValueError) as error:
            raise self.cannot_load(error) from None
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def folder(self, components: Sequence[str]) -> Path:
        """The folder with the files of these components; they are downloaded if need be. Raises TeacherError."""
        if Path(self.path).is_dir():
            return Path(self.path)
        parts = [name for name, value in self.index().items() if isinstance(value, list)]
        absent = {name: None for name in parts if name not in components}
        try:
            return Path(DiffusionPipeline.download(self.path, revision=self.revision, **absent))
        except (OSError, ValueError) as error:
            raise self.cannot_load(error) from None

    def cannot_load(self, error: Exception) -> TeacherError:
        """What to tell the user."""
        reason = " ".join(str(error).split())
        return TeacherError(f"the teacher {self.path!r} cannot be loaded as a pipeline: {reason}")


def pipeline_on_meta(source: TeacherSource) -> DiffusionPipeline:
    """The pipeline with networks and autoencoder without weights, from its configs alone. Raises TeacherError."""
    index, kind = source.index(), source.pipeline_class()
    parts: dict[str, Any] = {}
    try:
        for name in inspect.signature(kind.__init__).parameters:
            if isinstance(index.get(name), list):
                described = name.startswith(("transformer", "vae")) and index[name][1] is not None
                parts[name] = _on_meta(index[name][1], source, name) if described else None
            elif name in index:
                parts[name] = index[name]
        return kind(**parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise source.cannot_load(error) from None


def _on_meta(architecture: str, source: TeacherSource, name: str) -> nn.Module:
    kind = getattr(diffusers, architecture)
    settings = kind.load_config(source.path, subfolder=name, revision=source.revision)
    with torch.device("meta"):
        return kind.from_config(settings)


def load_text_side(
    source: TeacherSource, family: ModelFamily, images: bool = False, dtype: torch.dtype = torch.float32
) -> DiffusionPipeline:
    """The pipeline with what encodes prompts in this dtype, and what encodes images, when asked, in float32."""
    parts = (*TEXT_PARTS, *family.encoders, *((*IMAGE_PARTS, "vae") if images else ()))
    narrow = {name: dtype for name in source.index() if name.startswith(("text_encoder", "connectors"))}
    return source.load({"default": torch.float32, **narrow}, lambda name: name.startswith(parts))


def text_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype prompts are encoded for networks of this one; T5 overflows in float16."""
    return dtype if dtype == torch.float32 else torch.bfloat16


def load_image_side(source: TeacherSource, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline with networks and autoencoder, without what encodes prompts and images."""
    return source.load(dtype, lambda name: not name.startswith((*TEXT_PARTS, *IMAGE_PARTS)))


def load_without_networks(source: TeacherSource, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline with its autoencoder, without networks, and what encodes prompts and images."""
    return source.load(dtype, lambda name: name == "vae")


def move(pipeline: DiffusionPipeline, device: torch.device | str) -> DiffusionPipeline:
    """Move every loaded component to a device."""
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.to(device)
    return pipeline


def family_of_pipeline(pipeline: DiffusionPipeline) -> ModelFamily:
    """The model family of a loaded pipeline. Raises TeacherError."""
    try:
        return family_of(type(pipeline.transformer).__name__)
    except ValueError as error:
        raise TeacherError(f"the teacher's network: {error}") from None


def networks_of(pipeline: DiffusionPipeline, family: ModelFamily) -> dict[str, nn.Module]:
    """The networks of a teacher by component name, high noise first."""
    return {name: getattr(pipeline, name) for name in family.teacher_routing(pipeline.config).components}
