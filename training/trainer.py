"""The training loop: phases in sequence, fake and generator updates in turn, checkpoints, samples, experts."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from pdmd_core.distillation import PhasedDistiller, expert_velocities
from pdmd_core.roles import FAKE, Roles
from pdmd_core.rollout import route, sample
from training.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from training.command_line import UserError
from training.config import ConfigError, DistillConfig, RoleSection, with_defaults
from training.export import export_experts
from training.pictures import save_samples
from training.prompts import Example, PromptBank, PromptError, SampleSize, encode_examples, read_examples
from training.teacher import TeacherSource, family_of_pipeline, load_image_side, networks_of

FREE_TO_CHANGE = {
    "output_dir",
    "tracker",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "sample_every",
    "sample_prompts",
    "sample_seeds",
    "max_bad_updates",
    "expert_dtype",
}
"""Configuration keys that may differ between a run and its resumption: they do not change the numbers."""


class TrainingStopped(UserError):
    """The run cannot go on; what was reached is in the last checkpoint. One line."""


@dataclass
class Progress:
    """Where a run is: ``update`` generator updates of ``phase`` are done."""

    phase: int = 0
    update: int = 0
    total: int = 0
    bad_in_a_row: int = 0
    bad: int = 0


class Trainer:
    """One distillation run, from a configuration to an ``experts/`` folder."""

    def __init__(self, config: DistillConfig) -> None:
        self.config = config
        self.output_dir = config.output_dir
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # without it several processes on CPUs do not find each other
            mixed_precision=config.precision,
            log_with=config.tracker,
            project_dir=str(self.output_dir / "logs"),
        )
        self.device = self.accelerator.device
        self.plan = config.plan.build()
        self.objective = config.objective.build()
        model = config.model
        self.source = TeacherSource(model.path, model.revision, model.pipeline)
        self.pipeline = load_image_side(self.source, getattr(torch, model.dtype))
        self.family = family_of_pipeline(self.pipeline)
        self.latent_shape = self._latent_shape()
        self.bank = self._prompt_bank()
        torch.manual_seed(config.seed)
        routing = self.family.teacher_routing(self.pipeline.config)
        networks = {name: part.to(self.device) for name, part in networks_of(self.pipeline, self.family).items()}
        self.roles = Roles(networks, self.family, config.role_specs(routing), routing)
        if config.gradient_checkpointing:
            for role in self.roles.specs:
                for component in self.roles.components(role):
                    enable_gradient_checkpointing(self.roles.network(role, component))
        self.progress = Progress()
        self.shared = torch.Generator().manual_seed(config.seed)
        self.local = torch.Generator().manual_seed(config.seed + 1000 * (1 + self.accelerator.process_index))
        self.distiller: PhasedDistiller
        self.optimizers: dict[str, torch.optim.AdamW] = {}
        self.average: EMAModel | None = None

    def _latent_shape(self) -> tuple[int, ...]:
        model = self.config.model
        try:
            return self.family.latent_shape(self.pipeline, model.height, model.width, model.frames)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None

    def _prompt_bank(self) -> PromptBank:
        config, model = self.config, self.config.model
        examples = read_examples(config.prompts)
        if config.sample_prompts and examples[0].image is not None:
            raise PromptError(
                "sample_prompts: the teacher takes images; leave it out to see the first training prompts"
            )
        with self.accelerator.main_process_first():
            return encode_examples(
                [*examples, *map(Example, config.sample_prompts or [])],
                config.negative_prompt,
                self.source,
                self.family,
                SampleSize(model.height, model.width, model.frames, model.max_sequence_length),
                self.output_dir / "cache",
                self.device,
            )

    # --- the run ------------------------------------------------------------

    def run(self, resume: bool = False) -> Path:
        """Train all phases and write ``experts/``; returns that folder. Raises TrainingStopped, CheckpointError."""
        config = self.config
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._start_phase()
        if resume:
            self._resume()
        if self.accelerator.is_main_process:
            text = yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)
            (self.output_dir / "config.yaml").write_text(text, encoding="utf-8")
        self._trim_metrics()
        if config.tracker:
            self.accelerator.init_trackers("phased_dmd")
        everything = sum(config.updates_of(k) for k in range(len(self.plan)))
        bar = tqdm(
            total=everything,
            initial=self.progress.total,
            desc=self.distiller.expert,
            disable=not self.accelerator.is_main_process,
            smoothing=0.05,
        )
        while True:
            if self.progress.update >= config.updates_of(self.progress.phase):
                self._finish_phase()
                if self.progress.phase + 1 == len(self.plan):
                    break
                self.progress.phase, self.progress.update = self.progress.phase + 1, 0
                self._start_phase()
                bar.set_description(self.distiller.expert)
            losses = self.update()
            bar.set_postfix({name: f"{value:.3g}" for name, value in losses.items()}, refresh=False)
            bar.update()
            self._after_update(losses)
        bar.close()
        if config.tracker:
            self.accelerator.end_training()
        return self.output_dir / "experts"

    def _start_phase(self) -> None:
        config = self.config
        self.distiller = PhasedDistiller(self.plan, self.progress.phase, self.roles, self.objective)
        expert = self.distiller.expert
        if self.progress.phase:
            self.roles.reset(FAKE, self.shared)
        self.roles.set_trainable([expert, FAKE])
        self.optimizers = {
            expert: make_optimizer(self.roles.parameters(expert), config.generator),
            FAKE: make_optimizer(self.roles.parameters(FAKE), config.fake),
        }
        decay = config.ema_decay
        self.average = EMAModel(self.roles.parameters(expert), decay=decay) if decay else None

    def _finish_phase(self) -> None:
        """The average becomes the expert, which is frozen from now on; experts so far are written."""
        self._use_average()
        self.average = None
        self.roles.set_trainable([])
        self._sample(f"{self.distiller.expert}-final")
        if self.progress.phase + 1 == len(self.plan) and self.accelerator.is_main_process:
            export_experts(self.output_dir / "experts", self.config, self.plan, self.roles, self._summary())
        self.accelerator.wait_for_everyone()

    def _use_average(self) -> None:
        if self.average is not None:
            self.average.copy_to(self.roles.parameters(self.distiller.expert))

    # --- one update ------------------------------------------------------------

    def update(self) -> dict[str, float]:
        """Fake updates, then one generator update; returns the losses and gradient norms."""
        config, distiller = self.config, self.distiller
        for role, section in ((distiller.expert, config.generator), (FAKE, config.fake)):
            for group in self.optimizers[role].param_groups:
                group["lr"] = section.lr * self._lr_factor()
        fake_losses, fake_norms = [], []
        good = True
        for _ in range(config.fake_updates):
            indices, noise = self._draw()
            conditioning = self.bank.conditioning(indices, self.device)
            step = distiller.draw_step(self.shared)
            with self.accelerator.autocast():
                rollout = distiller.rollout(noise, conditioning, step, gradient=False)
            for _ in range(config.draws_per_rollout):
                t, renoise = self._draw_score(rollout.x_s)
                with self.accelerator.autocast():
                    loss = distiller.fake_loss(rollout.x_s, conditioning, t, renoise)
                value, norm = self._step(FAKE, loss, config.fake)
                good &= math.isfinite(norm)
                fake_losses.append(value)
                fake_norms.append(norm)
        indices, noise = self._draw()
        conditioning = self.bank.conditioning(indices, self.device)
        negative = self.bank.negative_conditioning(indices, self.device)
        step = distiller.draw_step(self.shared)
        with self.accelerator.autocast():
            rollout = distiller.rollout(noise, conditioning, step, gradient=True)
            t, renoise = self._draw_score(rollout.x_s)
            loss = distiller.generator_loss(rollout, conditioning, negative, t, renoise)
        generator_loss, norm = self._step(distiller.expert, loss, config.generator)
        good &= math.isfinite(norm)
        if self.average is not None and math.isfinite(norm):
            self.average.step(self.roles.parameters(distiller.expert))
        self._count_bad(good)
        self.progress.update += 1
        self.progress.total += 1
        return {
            "generator_loss": generator_loss,
            "fake_loss": sum(fake_losses) / len(fake_losses),
            "generator_grad_norm": norm,
            "fake_grad_norm": sum(fake_norms) / len(fake_norms),
        }

    def _lr_factor(self) -> float:
        updates, share = self.config.updates_of(self.progress.phase), self.config.lr_decay_share
        if not share:
            return 1.0
        return min(1.0, (updates - self.progress.update) / (share * updates))

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Which examples, shape (batch,), and starting noise."""
        batch = self.config.batch_size
        trained = len(self.bank.prompts) - len(self.config.sample_prompts or [])
        indices = torch.randint(trained, (batch,), generator=self.local)
        noise = torch.randn(batch, *self.latent_shape, generator=self.local)
        return indices, noise.to(self.device)

    def _draw_score(self, x_s: Tensor) -> tuple[Tensor, Tensor]:
        t = self.distiller.draw_score_sigma(len(x_s), self.local)
        return t, torch.randn(x_s.shape, generator=self.local).to(self.device)

    def _step(self, role: str, loss: Tensor, section: RoleSection) -> tuple[float, float]:
        """Backward, average over processes, clip, step; a NaN or Inf skips the step. Returns loss and gradient norm.

        What is averaged is equal on all processes, so all of them take or skip the step together.
        """
        parameters = self.roles.parameters(role)
        self.roles.activate(role)  # what gradient checkpointing recomputes must be this role
        loss.backward()
        if len(self.roles.components(role)) > 1:  # a network that had no sample here may have had one elsewhere
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.accelerator.num_processes > 1:
            for gradient in gradients:
                gradient.copy_(self.accelerator.reduce(gradient, "mean"))
        norm = torch.nn.utils.clip_grad_norm_(parameters, section.max_grad_norm)
        value = float(self.accelerator.reduce(loss.detach(), "mean"))
        finite = math.isfinite(value) and bool(torch.isfinite(norm))
        if finite:
            self.optimizers[role].step()
        self.optimizers[role].zero_grad(set_to_none=True)
        return value, float(norm) if finite else math.nan

    def _count_bad(self, good: bool) -> None:
        progress = self.progress
        progress.bad_in_a_row = 0 if good else progress.bad_in_a_row + 1
        progress.bad += not good
        if progress.bad_in_a_row >= self.config.max_bad_updates:
            kept = list_checkpoints(self.output_dir / "checkpoints")
            raise TrainingStopped(
                f"{progress.bad_in_a_row} updates in a row had NaN or Inf in loss or gradient (phase "
                f"{self.distiller.expert!r}, update {progress.update}); lower generator.lr or fake.lr and --resume "
                f"from {kept[-1] if kept else 'the start: no checkpoint was written yet'}"
            )

    # --- around the updates ------------------------------------------------------------

    def _after_update(self, losses: dict[str, float]) -> None:
        config, progress = self.config, self.progress
        if progress.total % config.log_every == 0 or progress.total == 1:
            values = {**losses, "phase": progress.phase, "lr_factor": self._lr_factor(), "bad_updates": progress.bad}
            if self.accelerator.is_main_process:
                line = json.dumps({"update": progress.total, "expert": self.distiller.expert, **values})
                with self._metrics_path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            if config.tracker:
                self.accelerator.log(values, step=progress.total)
        if config.sample_every and progress.total % config.sample_every == 0:
            self._sample(f"update-{progress.total:06d}")
        if progress.total % config.checkpoint_every == 0:
            self.save()

    @property
    def _metrics_path(self) -> Path:
        return self.output_dir / "metrics.jsonl"

    def _trim_metrics(self) -> None:
        """Drop lines of updates that are about to be done again."""
        if not self.accelerator.is_main_process or not self._metrics_path.exists():
            return
        lines = self._metrics_path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["update"] <= self.progress.total]
        self._metrics_path.write_text("".join(kept), encoding="utf-8")

    @torch.no_grad()
    def _sample(self, name: str) -> None:
        """A grid of fixed prompts and seeds through the experts so far; the last step jumps to sigma 0."""
        if not self.accelerator.is_main_process:
            return
        config = self.config
        extra = len(config.sample_prompts or [])
        count = extra or min(4, len(self.bank.prompts))
        first = len(self.bank.prompts) - extra if extra else 0
        indices = torch.arange(first, first + count).repeat_interleave(config.sample_seeds)
        generator = torch.Generator().manual_seed(config.seed)
        noise = torch.randn(config.sample_seeds, *self.latent_shape, generator=generator).repeat(
            count, *([1] * len(self.latent_shape))
        )
        conditioning = self.bank.conditioning(indices, self.device)
        expert = self.distiller.expert
        if self.average is not None:
            self.average.store(self.roles.parameters(expert))
            self._use_average()
        experts = expert_velocities(self.roles, self.plan, conditioning)
        sigmas = [s for phase in self.plan.phases[: self.progress.phase + 1] for s in phase.sigmas]
        with self.accelerator.autocast():
            latents = sample(route(experts, self.plan), sigmas, noise.to(self.device))
        if self.average is not None:
            self.average.restore(self.roles.parameters(expert))
        self.pipeline.vae.to(self.device)
        pixels = self.family.decode(self.pipeline, latents).cpu()
        save_samples(self.output_dir / "samples" / name, pixels, columns=config.sample_seeds)

    def _summary(self) -> dict[str, Any]:
        config = self.config
        return {
            "method": "Phased DMD" if len(self.plan) > 1 else "DMD",
            "updates": [config.updates_of(k) for k in range(len(self.plan))],
            "batch_size": config.batch_size * self.accelerator.num_processes,
            "fake_updates": config.fake_updates,
            "draws_per_rollout": config.draws_per_rollout,
            "teacher_guidance_scale": config.objective.guidance_scale,
            "generator_lr": config.generator.lr,
            "fake_lr": config.fake.lr,
            "seed": config.seed,
            "size": [config.model.width, config.model.height, config.model.frames],
            "max_sequence_length": config.model.max_sequence_length,
        }

    # --- checkpoints ------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of everything that the next update depends on."""
        generators = self.accelerator.gather(self.local.get_state().to(self.device)[None]).cpu()
        if self.accelerator.is_main_process:
            state = {
                "config": json.loads(self.config.model_dump_json()),
                "progress": asdict(self.progress),
                "roles": {role: self.roles.state_dict(role) for role in self.roles.specs},
                "optimizers": {role: optimizer.state_dict() for role, optimizer in self.optimizers.items()},
                "average": self.average.state_dict() if self.average is not None else None,
                "shared_generator": self.shared.get_state(),
                "local_generators": generators,
            }
            save_checkpoint(self.output_dir / "checkpoints", self.progress.total, state, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        checkpoints = list_checkpoints(self.output_dir / "checkpoints")
        if not checkpoints:
            self.accelerator.print(f"{self.output_dir}: no checkpoint to resume from, starting at update 0")
            return
        state = load_checkpoint(checkpoints[-1])
        self._check_same_config(state["config"])
        self.progress = Progress(**state["progress"])
        self._start_phase()
        for role, weights in state["roles"].items():
            self.roles.load_state_dict(role, weights)
        for role, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][role])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
            self.average.to(self.device)
        self.shared.set_state(state["shared_generator"])
        if len(state["local_generators"]) == self.accelerator.num_processes:
            own = state["local_generators"][self.accelerator.process_index]
            self.local.set_state(own.clone())  # torch reads the state as aligned memory, which a row of a tensor is not
        self.accelerator.print(f"resumed from {checkpoints[-1]}")

    def _check_same_config(self, before: dict[str, Any]) -> None:
        now = json.loads(self.config.model_dump_json())
        before = with_defaults(before)
        changed = [
            f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
            for key in sorted(set(before) | set(now))
            if before.get(key) != now.get(key) and key not in FREE_TO_CHANGE
        ]
        if changed:
            raise ConfigError(
                "the configuration changed since the checkpoint, so the run cannot be resumed; set it back or choose "
                f"another output_dir. Changed: {'; '.join(changed)}"
            )


def enable_gradient_checkpointing(network: Any) -> None:
    """Recompute activations in the backward pass (a method of every diffusers network)."""
    network.enable_gradient_checkpointing()


def make_optimizer(parameters: list[torch.nn.Parameter], section: RoleSection) -> torch.optim.AdamW:
    """AdamW as the section says."""
    return torch.optim.AdamW(parameters, lr=section.lr, betas=section.betas, weight_decay=section.weight_decay)
