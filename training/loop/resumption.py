"""From which checkpoint a run goes on, and whether it may: known from ``run.json`` before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.config.changes import changes_since
from training.config.schema import ConfigError, DistillConfig, parse_config, with_defaults
from training.loop.checkpoints import list_checkpoints, load_values, newest_whole, whole_checkpoint
from training.loop.progress import Progress


@dataclass(frozen=True)
class Resume:
    """What a run that goes on is asked for.

    Attributes:
        allowed: Keys of the configuration that may change though they decide numbers.
        update: The checkpoint of this update; the newest whole one when None.
    """

    allowed: Sequence[str] = ()
    update: int | None = None


@dataclass(frozen=True)
class Resumption:
    """A checkpoint from which a run goes on.

    Attributes:
        checkpoint: Its folder.
        values: Its ``run.json``.
        changed: What differs from then, in words.
        history: What was changed on request since the run began, each with its update.
    """

    checkpoint: Path
    values: Mapping[str, Any]
    changed: Sequence[str]
    history: Sequence[str]

    @property
    def progress(self) -> Progress:
        """Where the run was."""
        return Progress(**self.values["progress"])

    def check_prompts(self, identity: str, config: DistillConfig) -> None:
        """Raise ConfigError when the run trained on other prompts than those with this identity."""
        if self.values["prompts"] != identity:
            raise ConfigError(
                f"data.prompts: the content of {config.data.prompts} changed since the checkpoint (or what encodes it: "
                "the teacher's encoders, the negative prompt), so the run cannot be resumed; set it back or choose "
                "another output_dir"
            )

    def check_start(self, notes: Mapping[str, Mapping[str, Any]], config: DistillConfig) -> None:
        """Raise ConfigError when the run started from other files than those of these notes."""
        before = {name: note["sha256"] for name, note in self.values.get("start", {}).items()}
        now = {name: note["sha256"] for name, note in notes.items()}
        if before != now:
            (role, _), *_ = sorted(before.items() ^ now.items())
            teaches = role not in {phase.name for phase in config.plan.build().phases}
            key, found = ("model", config.model.experts) if teaches else ("start", config.start.experts)
            raise ConfigError(
                f"{key}.experts: {found} is not what the run started from, so it cannot be resumed; set "
                "it back or choose another output_dir"
            )

    def check_teacher(self, digest: str, config: DistillConfig) -> None:
        """Raise ConfigError when the run's teacher had other weights than those with this digest."""
        before = self.values.get("teacher")
        moved = with_defaults(self.values["config"])["model"]["path"] != config.model.path
        if before != digest if before is not None else moved:
            raise ConfigError(
                f"model.path: the weights of {config.model.path} are not those of the run's teacher"
                f"{'' if before is not None else ', as far as its checkpoint says'}, so the run cannot be resumed; set "
                "it back or choose another output_dir"
            )


def find_resumption(config: DistillConfig, resume: Resume, warn: Callable[[str], None]) -> Resumption | None:
    """Choose the checkpoint and compare its configuration with that of the run. All processes ask together.

    Args:
        config: The configuration of the run.
        resume: What is asked for.
        warn: Told of damaged checkpoints.

    Returns:
        None where there is no checkpoint yet.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged.
        ConfigError: The run cannot go on with this configuration.
    """
    folder = config.output_dir / "checkpoints"
    checkpoint = newest_whole(folder, warn) if resume.update is None else whole_checkpoint(folder, resume.update)
    if checkpoint is None:
        return None
    values = load_values(checkpoint)
    changes = changes_since(values["config"], config, resume.allowed)
    progress = Progress(**values["progress"])
    _check_updates(values["config"], config, progress)
    history = list(values.get("history", []))
    if later := [path for path in list_checkpoints(folder) if path.name > checkpoint.name]:
        history.append(f"after update {progress.total}: back from {later[-1].name}")
    history += [f"after update {progress.total}: {text}" for text in changes.requested]
    return Resumption(checkpoint, values, [*changes.free, *changes.requested], history)


def _check_updates(before: Mapping[str, Any], config: DistillConfig, progress: Progress) -> None:
    """Raise ConfigError when ``updates`` asks for other numbers in what is done already."""
    try:
        then = parse_config(with_defaults(before), "the checkpoint's configuration")
    except ConfigError:  # of another version; every key was compared
        return
    names, end = [phase.name for phase in config.plan.build().phases], 0
    for number in range(config.first_phase, progress.phase):
        end += then.updates_of(number)
        if config.updates_of(number) != then.updates_of(number):
            raise ConfigError(
                f"updates: phase {names[number]!r} is done with {then.updates_of(number)}, "
                f"{config.updates_of(number)} are asked for now: go on from its end with --from-checkpoint {end}, or "
                "change later phases only"
            )
    asked = config.updates_of(progress.phase)
    if progress.update > asked:
        raise ConfigError(
            f"updates: {progress.update} of phase {names[progress.phase]!r} are done, {asked} are asked for now: go "
            "back with --from-checkpoint, or ask for more"
        )
