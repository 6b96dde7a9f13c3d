"""A distillation run: phases in sequence, checkpoints, samples, experts. One phase's updates are PhaseTraining's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from tqdm.auto import tqdm

from pdmd_core.distillation import PhasedDistiller, expert_velocities
from pdmd_core.experts.format.fingerprint import fingerprint_of
from pdmd_core.roles import FAKE, Roles
from pdmd_core.rollout import route, sample
from training.config.command_line import UserError
from training.config.schema import DistillConfig
from training.data.teacher import TeacherSource, family_of_pipeline, load_image_side, networks_of
from training.data.training_data import training_data
from training.distributed.context_parallel import check_context_parallel, divide_samples
from training.distributed.sharding import check_processes, mesh_of, shard_roles
from training.evaluation.pictures import save_samples
from training.loop.checkpoints import list_checkpoints, load_values, newest_whole, save_checkpoint
from training.loop.compiling import compile_blocks
from training.loop.export import export_experts
from training.loop.optimizers import check_libraries
from training.loop.phase import Batches, PhaseTraining
from training.loop.progress import Progress
from training.loop.rng import RunRNG
from training.loop.signals import Stopped, StopRequest
from training.loop.state import check_same_config, check_same_prompts, resume_from, tensors_of_run, values_of_run
from training.memory.offload import keep_one_network
from training.memory.quantization import library_config, quantize
from training.monitoring.monitor import UpdateReport, monitors_of, warn


class TrainingStopped(UserError):
    """The run cannot go on; what was reached is in the last checkpoint. One line."""


class Trainer:
    """One distillation run, from a configuration to an ``experts/`` folder."""

    def __init__(self, config: DistillConfig) -> None:
        self.config = config
        self.output_dir = config.output_dir
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # without it several processes on CPUs do not find each other
            mixed_precision=config.precision,
            log_with=config.monitoring.tracker,
            project_dir=str(self.output_dir / "logs"),
        )
        self.device = self.accelerator.device
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        check_processes(config, processes)
        self.plan, model = config.plan.build(), config.model
        check_libraries(config)
        library_config(model.quantization)  # a missing library is said before anything is loaded
        self.source = TeacherSource(model.path, model.revision, model.pipeline)
        self.pipeline = load_image_side(self.source, getattr(torch, model.dtype))
        self.family = family_of_pipeline(self.pipeline)
        check_context_parallel(config, self.family, self.pipeline)
        self.data = training_data(config, self.source, self.family, self.pipeline, self.device)
        torch.manual_seed(config.seed)
        routing = self.family.teacher_routing(self.pipeline.config)
        networks, mesh = networks_of(self.pipeline, self.family), mesh_of(config, self.device, processes)
        self.fingerprints = {name: fingerprint_of(network) for name, network in networks.items()}
        quantize(networks.values(), model.quantization)
        one_at_a_time = config.memory.offload_idle_network and len(networks) > 1
        if mesh is None and not one_at_a_time:
            networks = {name: network.to(self.device) for name, network in networks.items()}
        self.roles = Roles(networks, self.family, config.role_specs(routing), routing, empty_copies=mesh is not None)
        if config.compile == "regional":
            compile_blocks(self.roles.networks())
        if mesh is not None:
            shard_roles(self.roles, mesh, self.device, torch.bfloat16 if config.precision == "bf16" else None)
        if one_at_a_time:
            keep_one_network(self.roles, self.device)
        together = config.parallel.context_parallel
        if together > 1:
            divide_samples(self.roles.networks(), together, self.device)
        self.evaluates_with_others = mesh is not None or together > 1
        if config.memory.gradient_checkpointing:
            for network in self.roles.networks():
                enable_gradient_checkpointing(network)
        self.progress = Progress()
        self.draws = RunRNG(config.seed, config.batch_size, self.data.order, rank // together, config.groups(processes))
        self.training: PhaseTraining
        """Of the current phase."""
        self.monitors = monitors_of(config, self.accelerator)

    @property
    def distiller(self) -> PhasedDistiller:
        """The losses of the current phase."""
        return self.training.distiller

    # --- the run ------------------------------------------------------------

    def run(self, resume: bool = False) -> Path:
        """Train all phases and write ``experts/``; returns that folder.

        Raises Stopped, TrainingStopped, CheckpointError, ConfigError.
        """
        config = self.config
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._start_phase()
        if resume:
            self._resume()
        if self.accelerator.is_main_process:
            text = yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)
            (self.output_dir / "config.yaml").write_text(text, encoding="utf-8")
        for monitor in self.monitors:
            monitor.start(self.progress.total)
            monitor.start_phase(self.training.expert, self.roles.parameters(self.training.expert))
        bar = tqdm(
            total=sum(config.updates_of(k) for k in range(len(self.plan))),
            initial=self.progress.total,
            desc=self.training.expert,
            disable=not self.accelerator.is_main_process,
            smoothing=0.05,
        )
        stop = 0
        kept: Path | None = None
        with StopRequest(self.device, self.accelerator.is_main_process) as request, bar:
            while kept is None:
                if self.progress.update >= config.updates_of(self.progress.phase):
                    self._finish_phase()
                    if self.progress.phase + 1 == len(self.plan):
                        break
                    self.progress.phase, self.progress.update = self.progress.phase + 1, 0
                    self._start_phase()
                    bar.set_description(self.training.expert)
                    for monitor in self.monitors:
                        monitor.start_phase(self.training.expert, self.roles.parameters(self.training.expert))
                values = self.update()
                bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)
                bar.update()
                stop = request.number()
                kept = self.save() if stop else None  # before samples, which take their time
                if config.validation.every and self.progress.total % config.validation.every == 0:
                    self._validate(f"update-{self.progress.total:06d}")
                if not stop and self.progress.total % config.checkpoints.every == 0:
                    self.save()
            for monitor in self.monitors:
                monitor.finish()
        if kept is not None:
            raise Stopped(stop, kept)
        return self.output_dir / "experts"

    def _start_phase(self) -> None:
        if self.progress.phase:
            self.roles.reset(FAKE, self.draws.shared)
        self.training = PhaseTraining(self.config, self.plan, self.progress.phase, self.roles, self.accelerator)

    def update(self) -> dict[str, float]:
        """One update of the current phase, counted and reported; returns its losses and gradient norms."""
        progress = self.progress
        update = self.training.update(self.draws, Batches(self.data.prompts, self.data.shapes), self._lr_factor())
        progress.count(update.good)
        if progress.bad_in_a_row >= self.config.max_bad_updates:
            self._stop()
        values = {"phase": progress.phase, "lr_factor": self._lr_factor(), "bad_updates": progress.bad}
        report = UpdateReport(progress.total, self.training.expert, {**update.values, **values}, update.sigmas)
        for monitor in self.monitors:
            monitor.after_update(report)
        return update.values

    def _lr_factor(self) -> float:
        updates, share = self.config.updates_of(self.progress.phase), self.config.lr_decay_share
        if not share:
            return 1.0
        return min(1.0, (updates - self.progress.update) / (share * updates))

    def _stop(self) -> None:
        kept = list_checkpoints(self.output_dir / "checkpoints")
        raise TrainingStopped(
            f"{self.progress.bad_in_a_row} updates in a row had NaN or Inf in loss or gradient (phase "
            f"{self.training.expert!r}, update {self.progress.update}); start anew in another output_dir with lower "
            f"generator.lr or fake.lr. {f'The last checkpoint is {kept[-1]}' if kept else 'No checkpoint was written'}"
        )

    def _finish_phase(self) -> None:
        """The average becomes the expert, which is frozen from now on; after the last phase experts are written."""
        self.training.finish()
        self._validate(f"{self.training.expert}-final")
        if self.progress.phase + 1 == len(self.plan):
            main = self.accelerator.is_main_process
            folder, prints = self.output_dir / "experts", self.fingerprints
            export_experts(folder, self.config, self.plan, self.roles, self._summary(), prints, main)
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _validate(self, name: str) -> None:
        """A grid of fixed prompts and seeds through the experts so far; the last step jumps to sigma 0."""
        if not (self.accelerator.is_main_process or self.evaluates_with_others):
            return
        config = self.config
        data = self.data
        indices = torch.arange(len(data.validation)).repeat_interleave(config.validation.seeds)
        noise = torch.randn(
            config.validation.seeds, *data.validation_shape, generator=torch.Generator().manual_seed(config.seed)
        ).repeat(len(data.validation), *([1] * len(data.validation_shape)))
        sigmas = [s for phase in self.plan.phases[: self.progress.phase + 1] for s in phase.sigmas]
        at_once = config.memory.micro_batch_size or len(indices)
        latents = []
        with self.training.averaged(), self.accelerator.autocast():
            for own, start in zip(indices.split(at_once), noise.split(at_once), strict=True):
                experts = expert_velocities(self.roles, self.plan, data.validation.conditioning(own, self.device))
                latents.append(sample(route(experts, self.plan), sigmas, start.to(self.device)))
        if not self.accelerator.is_main_process:
            return
        self.pipeline.vae.to(self.device)
        pixels = torch.cat([self.family.decode(self.pipeline, part).cpu() for part in latents])
        self.pipeline.vae.to("cpu")
        try:
            save_samples(self.output_dir / "samples" / name, pixels, columns=config.validation.seeds)
        except OSError as error:
            warn(f"samples {name} are not written, the run goes on: {error}")
        for monitor in self.monitors:
            monitor.validation(name, pixels, self.progress.total)

    def _summary(self) -> dict[str, Any]:
        config = self.config
        return {
            "method": "Phased DMD" if len(self.plan) > 1 else "DMD",
            "updates": [config.updates_of(k) for k in range(len(self.plan))],
            "batch_size": config.batch_size,
            "fake_updates": config.fake_updates,
            "draws_per_rollout": config.draws_per_rollout,
            "teacher_guidance_scale": config.objective.guidance_scale,
            "negative_prompt": config.data.negative_prompt,
            "pipeline": config.model.pipeline,
            "generator_lr": config.generator.lr,
            "fake_lr": config.fake.lr,
            "seed": config.seed,
            "size": [config.model.width, config.model.height, config.model.frames],
            "max_sequence_length": config.model.max_sequence_length,
        }

    # --- checkpoints ------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint of everything that the next update depends on; returns it."""
        tensors = tensors_of_run(self.roles, self.training, self.draws)
        values = values_of_run(self.config, self.progress, self.roles, self.training, self.data.prompts.identity)
        folder = self.output_dir / "checkpoints"
        return save_checkpoint(folder, self.progress.total, tensors, values, self.config.checkpoints.keep)

    def _resume(self) -> None:
        main = self.accelerator.is_main_process
        checkpoint = newest_whole(self.output_dir / "checkpoints", warn if main else lambda text: None)
        if checkpoint is None:
            self.accelerator.print(f"{self.output_dir}: no checkpoint to resume from, starting at update 0")
            return
        values = load_values(checkpoint)
        changed = check_same_config(values["config"], self.config)
        check_same_prompts(values, self.data.prompts.identity, self.config)
        self.progress = Progress(**values["progress"])
        self._start_phase()
        resume_from(checkpoint, values, self.roles, self.training, self.draws)
        self.accelerator.print(f"resumed from {checkpoint}" + (f", with {'; '.join(changed)}" if changed else ""))


def enable_gradient_checkpointing(network: Any) -> None:
    """Recompute activations in the backward pass (a method of every diffusers network)."""
    network.enable_gradient_checkpointing()
