"""What a command line leaves open is taken from what the experts note of their distillation."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdmd_core.experts import ExpertsError, Manifest, PhasedExperts
from pdmd_core.experts.hub.ids import is_hub_id
from training.config.command_line import UserError
from training.data.buckets import SampleSize

if TYPE_CHECKING:  # it imports diffusers, and --help needs this module
    from training.data.teacher import TeacherSource

_SMALL = (64, 64, 1)
"""Width, height and frames of a teacher that is sampled without experts."""
_TOKENS = 512


@dataclass(frozen=True)
class GivenSize:
    """What the command line says of the size of samples.

    Args:
        width: Pixels; None where the command line leaves it open, here and below.
        height: Pixels.
        frames: Frames of a clip; 1 for pictures.
        max_sequence_length: Tokens to which prompts are padded.
    """

    width: int | None
    height: int | None
    frames: int | None
    max_sequence_length: int | None

    def complete(self, experts: Mapping[str, PhasedExperts]) -> SampleSize:
        """The size with what is open as the experts were distilled.

        Args:
            experts: Name of each method to its experts; without any, a picture of 64x64 pixels completes it.

        Returns:
            The size; prompts are padded as for the first experts.

        Raises:
            UserError: When experts differ in what is left open, or do not say it.
        """
        manifests = {name: own.manifest for name, own in experts.items()}
        given = (self.width, self.height, self.frames)
        noted = {name: manifest.training.get("size") for name, manifest in manifests.items()}
        sizes = {(*size,): name for name, size in noted.items() if size is not None}
        if None in given and len(sizes) > 1:
            found = ", ".join(f"{name} {'x'.join(map(str, size))}" for size, name in sizes.items())
            raise UserError(f"experts of different sizes: {found}: choose one with --width, --height and --frames")
        if None in (self.width, self.height) and noted and not sizes:
            raise UserError(
                f"{next(iter(experts.values())).folder}: these experts do not say what size they were distilled for: "
                "give --width and --height"
            )
        default = next(iter(sizes), _SMALL)
        width, height, frames = (own if own is not None else other for own, other in zip(given, default, strict=True))
        length = self.max_sequence_length
        if length is None and manifests:
            length = next(iter(manifests.values())).training.get("max_sequence_length")
        return SampleSize(height, width, frames, _TOKENS if length is None else length)


def teacher_source(experts: PhasedExperts | None, teacher: str | None, pipeline: str | None) -> TeacherSource:
    """Where the teacher is.

    Args:
        experts: The experts, None for a teacher alone.
        teacher: Folder or Hub id in place of the base that the manifest names.
        pipeline: Diffusers class in place of the one that the experts were distilled with.

    Returns:
        The source, with the manifest's revision where the teacher is the manifest's base. A base that is a relative
        path may lie there seen from here, or from the experts folder.

    Raises:
        UserError: When neither names a teacher, or the base is a folder that is not here.
    """
    from training.data.teacher import TeacherSource

    if experts is None:
        if teacher is None:
            raise UserError("nothing to sample with: give --experts or --teacher")
        return TeacherSource(teacher, None, pipeline)
    manifest, base = experts.manifest, experts.manifest.base
    own = teacher is None or teacher == base.model
    return TeacherSource(
        _place_of_base(experts) if teacher is None else teacher,
        base.revision if own else None,
        noted(manifest, "pipeline", str, None) if pipeline is None else pipeline,
    )


def _place_of_base(experts: PhasedExperts) -> str:
    model = experts.manifest.base.model
    beside = experts.folder / model
    if Path(model).is_dir() or is_hub_id(model):
        return model
    if beside.is_dir():
        return str(beside)
    raise UserError(
        f"{experts.folder}: the base of these experts, {model!r}, is no folder here, nor seen from the experts folder: "
        "say with --teacher where it lies now, as a folder or a Hub id"
    )


def noted(manifest: Manifest, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
    """A value of ``manifest.training``, which may hold anything; ``default`` where there is none or null.

    Raises:
        UserError: When it is of another kind.
    """
    value = manifest.training.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"the experts' manifest: training.{key} cannot be {value!r:.60}: write it anew")
    return value


def unfinished(manifest: Manifest) -> str | None:
    """What experts of a run that is not finished lack, in a line; None for those of a finished one.

    Args:
        manifest: Of the experts.

    Raises:
        UserError: When the manifest says it in a way that cannot be read.
    """
    note = noted(manifest, "unfinished", dict, {})
    if not note:
        return None
    missing = ", ".join(map(str, note.get("missing", [])))
    last = manifest.plan.phases[-1]
    return (
        f"the run of these experts is not finished, {missing} is missing: samples jump from sigma "
        f"{last.sigmas[-1]:.4g} of {last.name} to 0, which is blurred"
    )


def open_experts(folder: str | Path) -> PhasedExperts:
    """Open experts to sample them; those of a run that is not finished are said on standard error.

    Args:
        folder: The experts folder.

    Raises:
        ExpertsError: There are no experts, or they are damaged; of a run that is not finished, with what it has.
    """
    try:
        experts = PhasedExperts.open(folder)
    except ExpertsError as error:
        run = Path(folder).parent
        parts = sorted(path.name for path in run.glob("experts-*") if path.is_dir())
        if Path(folder).exists() or not (parts or (run / "checkpoints").is_dir()):
            raise
        has = f"it has {', '.join(parts)}; " if parts else ""
        raise ExpertsError(
            f"{error}; the run is not finished: {has}distill.py --export --output_dir {run} makes those of a checkpoint"
        ) from None
    if note := unfinished(experts.manifest):
        print(f"note: {note}", file=sys.stderr)
    return experts
