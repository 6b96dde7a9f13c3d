"""A distillation run: phases in sequence, checkpoints, validations, experts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import yaml
from tqdm.auto import tqdm

from pdmd_core.experts import ExpertsError
from pdmd_core.method import fake_roles
from training.config.command_line import UserError
from training.distributed.processes import of_first_process
from training.evaluation.pictures import save_samples
from training.loop.batches import DataBatches
from training.loop.best import BestCheckpoints, StoppedEarly
from training.loop.build import BuiltRun
from training.loop.checkpoint_writer import CheckpointWriter
from training.loop.checkpoints import list_checkpoints, set_aside_later
from training.loop.export import export_experts, trained_part, training_summary
from training.loop.optimizers import lr_factor
from training.loop.phase import PhaseTraining, Update
from training.loop.progress import Progress
from training.loop.resumption import Resumption
from training.loop.rollout_bank import open_bank
from training.loop.signals import Stopped, StopSignals
from training.loop.state import restore_state, state_tensors, state_values
from training.loop.teacher_comparison import TeacherComparison
from training.loop.teacher_samples import SharedEvaluationFailed
from training.memory.offload import keep_idle_experts_away
from training.monitoring.bars import progress_bar
from training.monitoring.jsonl import monitoring_log
from training.monitoring.monitor import UpdateReport, warn
from training.monitoring.monitors import monitors_of


class TrainingStopped(UserError):
    """The run cannot go on; what was reached is in the last checkpoint. One line."""


class Trainer:
    """Trains a run that was built, from its first phase to an ``experts/`` folder.

    Args:
        run: What ``build_run`` made.

    Attributes:
        progress: Where the run is.
        training: The phase in training.
    """

    training: PhaseTraining

    def __init__(self, run: BuiltRun) -> None:
        self.built, self.config, self.plan, self.roles = run, run.config, run.plan, run.roles
        self.accelerator, self.output_dir = run.accelerator, run.config.output_dir
        boundary, groups = run.roles.routing.boundary, run.config.score_groups
        self.batches = DataBatches(run.rng, run.data.prompts, run.data.shapes, boundary, groups)
        self.progress = Progress(phase=run.config.first_phase)
        self.monitors = monitors_of(run.config, run.accelerator)
        self.comparison = TeacherComparison(run, self.monitors)
        self.best = BestCheckpoints(run.config.checkpoints)
        self.checkpoints = CheckpointWriter(run.config.checkpoints.background, run.config.parallel.timeout_minutes)

    def run(self) -> Path:
        """Train all phases and write the experts, from the checkpoint from which the run was built to go on.

        What ends a run comes last: a checkpoint is written before the validation of its update, at the end of every
        phase, and so before experts are written.

        Returns:
            The folder of the experts.

        Raises:
            Stopped: If a signal asked for it; everything is in a checkpoint.
            StoppedEarly: If it is asked to stop when it does not get better, or is broken.
            SharedEvaluationFailed: If a validation failed that other processes share.
            TrainingStopped: If too many updates in a row were not finite.
            UserError: If a checkpoint cannot be written or read.
        """
        config = self.config
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.start_phase()
        if self.built.resumption:
            self.resume(self.built.resumption)
        self.open_bank(self.built.resumption is not None)
        self._write_config()
        progress = self.progress
        self.monitors.start(progress.total)
        self.best = BestCheckpoints(config.checkpoints, monitoring_log(self.output_dir, "validations").read())
        self.comparison.start()
        self.monitors.start_phase(self.training.expert, self.roles.parameters(self.training.expert))
        bar = self._progress_bar()
        stop, kept = 0, None
        signals_of_run = StopSignals(self.accelerator.device, self.accelerator.is_main_process)
        with self.checkpoints, signals_of_run as signals, bar:
            self._validate_when_due()  # also after a checkpoint: the run may have ended before the samples were there
            while kept is None:
                if progress.update >= config.updates_of(progress.phase):
                    self.finish_phase()
                    if progress.phase + 1 == len(self.plan):
                        break
                    progress.phase, progress.update = progress.phase + 1, 0
                    self.start_phase()
                    self.open_bank()
                    bar.set_description(self.training.expert)
                    self.monitors.start_phase(self.training.expert, self.roles.parameters(self.training.expert))
                update = self.update()
                self.checkpoints.check()
                bar.set_postfix({name: f"{value:.3g}" for name, value in update.values.items()}, refresh=False)
                bar.update()
                stop = signals.received()
                phase_ends = progress.update >= config.updates_of(progress.phase)
                if stop or phase_ends or progress.total % config.checkpoints.every == 0:
                    saved = self.save()  # before samples, which take their time and may fail
                    kept = saved if stop else None
                    if stop or phase_ends:
                        self.checkpoints.wait()
                self._validate_when_due()
                self._stop_early()
            self.monitors.finish()
        if kept is not None:
            raise Stopped(stop, kept)
        return self.output_dir / "experts"

    def start_phase(self) -> None:
        """Begin the phase at which the run is: a fake that is the teacher again, and the phase's expert in training."""
        phase = self.progress.phase
        if phase > self.config.first_phase:
            for fake in fake_roles(self.plan, self.config.objective):
                self.roles.reset(fake, self.built.rng.shared)
        if self.config.memory.offload_idle_experts:
            keep_idle_experts_away(self.roles, self.plan, phase, self.accelerator.device)
        self.training = PhaseTraining(self.config, self.plan, phase, self.roles, self.accelerator)

    def open_bank(self, resumed: bool = False) -> None:
        """Let the phase begin with samples that earlier experts, frozen by now, or the teacher make once."""
        of_teacher = self.config.objective.expert_loss == "denoising"
        if not self.config.rollouts.bank or not (self.progress.phase or of_teacher):
            return
        rng, before = self.built.rng, self.built.rng.order
        self.batches.bank, rng.order = open_bank(self.built, self.progress.phase)
        if resumed:
            rng.order.load_state(before.state())

    def update(self) -> Update:
        """Make one update of the current phase, count it and report it to the monitors."""
        progress, config = self.progress, self.config
        factor = lr_factor(progress.update, config.updates_of(progress.phase), config.lr_decay_share)
        update = self.training.update(self.batches, factor)
        progress.count(update.good)
        if progress.bad_in_a_row >= config.max_bad_updates:
            self._give_up()
        values = {**update.values, "phase": progress.phase, "lr_factor": factor, "bad_updates": progress.bad}
        self.monitors.after_update(UpdateReport(progress.total, self.training.expert, values, update.sigmas))
        return update

    def _give_up(self) -> None:
        self.checkpoints.wait()
        kept = list_checkpoints(self.output_dir / "checkpoints")
        raise TrainingStopped(
            f"{self.progress.bad_in_a_row} updates in a row had NaN or Inf in loss or gradient (phase "
            f"{self.training.expert!r}, update {self.progress.update}); start anew in another output_dir with lower "
            f"generator.lr or fake.lr. {f'The last checkpoint is {kept[-1]}' if kept else 'No checkpoint was written'}"
        )

    def finish_phase(self) -> None:
        """Make the average the expert, which is frozen from now on, and write the experts that are there."""
        self.training.finish()
        self.validate(f"{self.training.expert}-final")
        if self.progress.phase + 1 == len(self.plan):
            self._export("experts")
        else:
            try:
                self._export(f"experts-{self.training.expert}")
            except (OSError, ExpertsError) as error:  # all of it is in the checkpoint, and in the experts at the end
                warn(f"experts-{self.training.expert} is not written, the run goes on: {error}")
        self.accelerator.wait_for_everyone()

    def _export(self, name: str) -> None:
        """Write the experts so far into a folder of the run."""
        built = self.built
        summary = training_summary(self.config, self.plan, self.progress, built.start, built.pipeline, built.history)
        plan, prints = trained_part(self.plan, self.progress.phase), self.built.fingerprints
        main = self.accelerator.is_main_process
        export_experts(self.output_dir / name, self.config, plan, self.roles, summary, prints, main)

    def _validate_when_due(self) -> None:
        """Validate before the first update, which shows what cannot be decoded, and every so many updates."""
        every, total = self.config.validation.every, self.progress.total
        if total == 0 or (every and total % every == 0):
            self.validate(f"update-{total:06d}")

    def validate(self, name: str) -> None:
        """Sample the fixed prompts and seeds, save the samples under this name and show them to the monitors.

        What fails here is a warning: samples are looked at, and no update depends on them. Only where processes share
        the evaluation does it end the run, whose checkpoint was written before.
        """
        if not (self.accelerator.is_main_process or self.built.evaluates_with_others):
            return
        update, expert, every = self.progress.total, self.training.expert, self.config.validation.features_every
        try:
            latents = self.comparison.sample(self.training, every is None or update % every == 0)
            if not self.accelerator.is_main_process:
                return
            shown = self.comparison.measure(name, update, expert, latents)
            del latents
            try:
                save_samples(self.output_dir / "samples" / name, shown.pixels, columns=self.config.validation.seeds)
            except OSError as error:
                warn(f"samples {name} are not written, the run goes on: {error}")
            self.monitors.validation(shown)
            self.best.after_validation(expert, update, shown.measures)
        except SharedEvaluationFailed:
            raise
        except Exception as error:  # out of memory, of the decoder, of a library that writes pictures
            text = " ".join(str(error).split())[:300]
            warn(f"validation {name} failed, the run goes on: {type(error).__name__}: {text}")

    def _stop_early(self) -> None:
        """Raise StoppedEarly where the configuration asks for it. All processes ask together."""
        if self.config.checkpoints.patience is None and not self.config.monitoring.stop_when_broken:
            return
        reasons = of_first_process(
            lambda: (self.best.reason_to_stop(self.training.expert), self.monitors.reason_to_stop())
        )
        if reason := next(filter(None, reasons), None):
            self.monitors.finish()
            raise StoppedEarly(reason)

    def save(self) -> Path:
        """Write a checkpoint of everything that the next update depends on, or begin to; returns its folder."""
        tensors = state_tensors(self.roles, self.training, self.built.rng)
        values = state_values(self.built, self.progress, self.training)
        folder, keep = self.output_dir / "checkpoints", self.config.checkpoints.keep
        return self.checkpoints.save(folder, self.progress.total, tensors, values, keep, self._stays_for_good)

    def _stays_for_good(self, update: int) -> bool:
        """Whether the checkpoint of an update is never removed: from the end of a phase the next is trained again."""
        every = self.config.checkpoints.keep_every
        numbers = [self.config.updates_of(k) for k in range(self.config.first_phase, len(self.plan))]
        ends = set(itertools.accumulate(numbers))
        return update in ends | self.best.updates or bool(every and update % every == 0)

    def resume(self, resumption: Resumption) -> None:
        """Go on from a checkpoint; later ones, of a run that goes back, are set aside."""
        self.progress = resumption.progress
        self.start_phase()
        restore_state(resumption.checkpoint, resumption.values, self.roles, self.training, self.built.rng)
        for aside in set_aside_later(resumption.checkpoint):
            warn(f"{aside.name} is set aside, the run goes on from {resumption.checkpoint.name}")
        changed = f", with {'; '.join(resumption.changed)}" if resumption.changed else ""
        self.accelerator.print(f"resumed from {resumption.checkpoint}{changed}")

    def _write_config(self) -> None:
        if self.accelerator.is_main_process:
            text = yaml.safe_dump(json.loads(self.config.model_dump_json()), sort_keys=False)
            (self.output_dir / "config.yaml").write_text(text, encoding="utf-8")

    def _progress_bar(self) -> tqdm[None]:
        return progress_bar(
            total=sum(self.config.updates_of(k) for k in range(self.config.first_phase, len(self.plan))),
            initial=self.progress.total,
            desc=self.training.expert,
            disable=not self.accelerator.is_main_process,
            smoothing=0.05,
        )
