"""What validations of a run are compared with: the teacher's samples of the same prompts and noise."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from training.loop.build import BuiltRun
from training.loop.phase import PhaseTraining
from training.loop.teacher_samples import SharedEvaluationFailed, teacher_samples
from training.loop.validation import decoded, validation_latents
from training.monitoring.feature_statistics import FeatureComparison, FeatureStatistics
from training.monitoring.monitor import Validation, warn
from training.monitoring.monitors import Monitors
from training.monitoring.sample_statistics import sample_statistics, thumbnails


@dataclass(frozen=True)
class ValidationLatents:
    """Samples of a validation before they are decoded: those that are shown, and those that features are taken of."""

    shown: list[Tensor]
    measured: list[Tensor]


class TeacherComparison:
    """Samples, decodes and measures validations.

    Args:
        run: The run.
        monitors: Told of the teacher's samples.
    """

    def __init__(self, run: BuiltRun, monitors: Monitors) -> None:
        self.run, self.monitors = run, monitors
        self.thumbnails: dict[str, Tensor] = {}
        """Of the teacher's samples, by phase."""
        self.features: FeatureComparison | None = None

    def start(self) -> None:
        """Sample the teacher, or find its samples. All processes call this together.

        A failure is a warning, but where processes share an evaluation.

        Raises:
            SharedEvaluationFailed: The evaluation failed in this process.
        """
        run, validation = self.run, self.run.config.validation
        if validation.teacher_steps is None:
            return
        try:
            shown = teacher_samples(run, run.data.validation)
            measured = teacher_samples(run, run.data.measured) if run.data.measured else {}
            if run.accelerator.is_main_process:
                self._show(shown, measured)
        except SharedEvaluationFailed:
            raise
        except Exception as error:  # out of memory, of the decoder, a full disk
            warn(f"validations are not compared with the teacher, the run goes on: {_one_line(error)}")

    def _show(self, shown: dict[str, Tensor], measured: dict[str, Tensor]) -> None:
        run, validation = self.run, self.run.config.validation
        at_once = run.config.memory.micro_batch_size or len(next(iter(shown.values())))
        if validation.features and measured:
            memory = run.config.output_dir / "cache" / "hashes.json"
            self.features = FeatureComparison(validation.features, memory, run.accelerator.device)
            for phase, latents in measured.items():
                self.features.teacher[phase] = self.features.rows(decoded(run, list(latents.split(at_once))))
        for phase, latents in shown.items():
            pixels = decoded(run, list(latents.split(at_once)))
            self.thumbnails[phase] = thumbnails(pixels)
            features = self.features.of_teacher(phase, validation.seeds) if self.features else None
            self.monitors.teacher(phase, pixels, sample_statistics(pixels, validation.seeds), features)

    def sample(self, training: PhaseTraining, measured: bool) -> ValidationLatents:
        """Sample the fixed prompts and seeds, and what features are taken of.

        Args:
            training: The phase in training.
            measured: Whether features are due.

        Raises:
            SharedEvaluationFailed: It failed in this process, and others wait for it.
        """
        run = self.run
        try:
            shown = validation_latents(run, training, run.data.validation)
            due = measured and run.data.measured is not None
            return ValidationLatents(shown, validation_latents(run, training, run.data.measured) if due else [])  # type: ignore[arg-type]
        except Exception as error:
            if not run.evaluates_with_others:
                raise
            raise SharedEvaluationFailed(
                f"a validation failed in process {run.accelerator.process_index}, and the other processes wait in the "
                f"middle of it, so the run ends: {_one_line(error)}. The checkpoint of its update was written before: "
                "go on with --resume, and a smaller memory.micro_batch_size"
            ) from error

    def measure(self, name: str, update: int, expert: str, latents: ValidationLatents) -> Validation:
        """Decode the samples of a validation and compare them with the teacher's, on the main process."""
        run, seeds = self.run, self.run.config.validation.seeds
        pixels = decoded(run, latents.shown)
        features: FeatureStatistics | None = None
        if latents.measured and self.features:
            features = self.features.compare(decoded(run, latents.measured), expert, seeds)
        statistics = sample_statistics(pixels, seeds, self.thumbnails.get(expert))
        return Validation(name, update, expert, pixels, statistics, features)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
