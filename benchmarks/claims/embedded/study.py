"""The comparison on the embedded teachers: every run trained once, measured once, both kept in files."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from benchmarks.claims.common.distilling import Recipe, distil
from benchmarks.claims.common.evidence import Row
from benchmarks.claims.common.files import identity_of, read_row, write_row, write_tensors, write_text
from benchmarks.claims.common.methods import Run
from benchmarks.claims.embedded.measures import Features, Measured, Measures, Scene, all_scenes, distances
from benchmarks.claims.embedded.measures import measured_scenes as default_scenes
from benchmarks.claims.embedded.training import (
    MODELS,
    EmbeddedProblem,
    EmbeddedSettings,
    digest_of,
    digest_of_teacher,
    make_roles,
)
from pdmd_core.experts import PhasedExperts
from pdmd_core.experts.convert.low_rank import extract
from pdmd_core.experts.format.weights import weights_of
from pdmd_core.families import TeacherRouting
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import Roles, RoleSpec
from pdmd_core.rollout import route, sample
from pdmd_core.velocities import expert_velocities
from training.data.buckets import SampleSize
from training.embedded.emoji import BACKGROUNDS, EMOJI, MOTIONS, EmojiScenes
from training.embedded.train_autoencoder import one_frame_convolution
from training.evaluation.sampler import Sampler
from training.loop.export import roles_from_experts

_REFERENCE_SEED = 1_000_000
"""Noise of the reference starts here, that of rows at 0: a row of the teacher is not compared with itself."""
_DATA_SEED = 2026
_BATCH = 64
_CLIPS_DECODED = 8


@dataclass(frozen=True)
class Measuring:
    """How many samples of what are measured."""

    scenes: tuple[Scene, ...]
    seeds: int
    """For each scene, in a row."""
    teacher_steps: int = 40
    resamples: int = 200
    """Of bootstrap intervals of the Frechet distance."""
    networks: str = field(
        default_factory=lambda: digest_of_teacher(("vae",)) + digest_of([MODELS / "features" / "model.safetensors"])
    )
    version: int = 4
    """Of the definitions in embedded_measures.py: raised when a number changes its meaning."""

    def as_dict(self) -> dict[str, Any]:
        """For identity and reports."""
        return {**asdict(self), "scenes": [scene.caption for scene in self.scenes]}


PICTURES = EmbeddedSettings(
    frames=1,
    prompts=tuple(scene.caption for scene in all_scenes(clips=False)),
    recipe=Recipe(
        batch_size=32,
        fake_updates=1,
        draws_per_rollout=6,
        fake_lr_factor=1.0,
        ema_decay=0.95,
        ema_warm_up=True,
        lr_decay_share=0.3,
        max_grad_norm=1.0,
    ),
    guidance_scale=2.0,
)
"""Of guidance 1, 1.5, 2 and 3 the teacher's pictures are nearest to real ones at 2 and agree best with prompts."""
CLIPS = replace(
    PICTURES,
    frames=9,
    prompts=tuple(scene.caption for scene in all_scenes(clips=True)),
    recipe=replace(PICTURES.recipe, batch_size=12),
    guidance_scale=3.0,
)
"""Of guidance 1, 2 and 3 the teacher's clips are nearest to real ones at 3."""
SETTINGS = {"pictures": PICTURES, "clips": CLIPS}
GRIDS = {"pictures": (1e-3, 3e-4, 3e-3, 1e-2), "clips": (1e-3, 3e-4, 3e-3)}
"""Learning rates. The grid of a teacher goes on until none of the four methods is best at its end."""


class AskedScenes(EmojiScenes):
    """Real scenes of given captions; what they do not say stays random."""

    def __init__(self, scenes: list[Scene], seed: int) -> None:
        super().__init__(seed)
        self.asked = {
            len(EMOJI): [list(EMOJI).index(scene.emoji) for scene in scenes],
            len(BACKGROUNDS): [list(BACKGROUNDS).index(scene.background) for scene in scenes],
            len(MOTIONS): [MOTIONS.index(scene.motion) for scene in scenes if scene.motion],
        }

    def _choice(self, count: int, options: int) -> Tensor:
        if self.asked.get(options):
            return torch.tensor(self.asked[options])
        return super()._choice(count, options)


class EmbeddedStudy:
    """Files of one choice of settings, in a folder named after them; measurements in one below, named after theirs."""

    grid_seeds = 1
    """It is run with the first so many seeds; the best learning rate of each method gets the others."""
    updates = 120
    """Generator updates over all phases."""
    longer = (2, 4)
    """Times the updates, in the stage "long"."""

    def __init__(
        self, work_dir: Path, teacher: str, settings: EmbeddedSettings, measuring: Measuring | None = None
    ) -> None:
        clips = teacher == "clips"
        self.teacher = teacher
        self.lrs = GRIDS[teacher]
        self.settings = settings
        self.measuring = measuring or Measuring(tuple(default_scenes(clips)), seeds=8 if clips else 24)
        steps = self.measuring.teacher_steps
        self.references = {
            f"teacher_{steps}": f"teacher, {steps} steps",
            "teacher_4": "teacher, 4 steps",
            "data": "data",
        }
        self.folder = work_dir / f"{teacher}-{identity_of(self.settings.as_dict())}"
        measured = {**self.settings.as_dict(), "measuring": self.measuring.as_dict()}
        self.measured = self.folder / f"measured-{identity_of(measured)}"
        write_text(self.folder / "settings.json", json.dumps(self.settings.as_dict(), indent=1) + "\n")
        write_text(self.measured / "settings.json", json.dumps(measured, indent=1) + "\n")

    def describe(self) -> dict[str, object]:
        """Settings for the report."""
        measuring = self.measuring.as_dict()
        return {**self.settings.as_dict(), "measuring": {**measuring, "scenes": len(measuring["scenes"])}}

    def prepare(self) -> None:
        """The features that everything is compared with; real scenes first, as they take seconds and need a font."""
        _ = self.data, self.reference

    # --- samples ------------------------------------------------------------

    @cached_property
    def sampler(self) -> Sampler:
        """The teacher; its prompts are those of training, then those that are measured."""
        captions = [*self.settings.prompts, *(scene.caption for scene in self.measuring.scenes)]
        size = SampleSize(64, 64, self.settings.frames, 16)
        sampler = Sampler(str(MODELS / "teacher"), size, captions, self.folder / "cache")
        for module in sampler.pipeline.vae.modules():
            if isinstance(module, nn.Conv3d):  # as a CPU reads them faster
                module.weight.data = module.weight.to(memory_format=torch.channels_last_3d)
        return sampler

    @cached_property
    def measures(self) -> Measures:
        """Of the measured scenes."""
        return Measures(self.measuring.scenes, self.measuring.seeds)

    def pairs(self, first_seed: int) -> list[tuple[int, int]]:
        """(prompt index, noise seed) of every sample, scene by scene; no two have the same noise."""
        first, seeds = len(self.settings.prompts), self.measuring.seeds
        scenes = range(len(self.measuring.scenes))
        return [(first + i, first_seed + i * seeds + k) for i in scenes for k in range(seeds)]

    def shown_scenes(self, count: int) -> list[Scene]:
        """Some of the measured scenes, for pictures."""
        return [self.measuring.scenes[i] for i in self._shown(count)]

    def shown_pairs(self, count: int, seeds: int) -> list[tuple[int, int]]:
        """Those of the first seeds of these scenes, in the rows of seed 0."""
        pairs = self.pairs(noise_seed(0))
        return [pairs[i * self.measuring.seeds + k] for i in self._shown(count) for k in range(seeds)]

    def _shown(self, count: int) -> list[int]:
        scenes = len(self.measuring.scenes)  # evenly; the second of each part is no star on yellow
        return [(i * scenes // count + 1) % scenes for i in range(count)]

    def teacher_samples(self, steps: int, pairs: list[tuple[int, int]]) -> Tensor:
        """Pixels of the teacher with guidance, (count, frames, 3, 64, 64) in [0, 1]."""
        shift, scale = self.settings.shift, self.settings.guidance_scale
        return self.decode(self.sampler.with_teacher(pairs, steps, shift, scale))

    def data_samples(self, seed: int) -> Tensor:
        """Real scenes of the measured captions. Needs the emoji font."""
        scenes = [scene for scene in self.measuring.scenes for _ in range(self.measuring.seeds)]
        parts = []
        for start in range(0, len(scenes), _BATCH):
            some = scenes[start : start + _BATCH]
            draw = AskedScenes(some, _DATA_SEED + 1000 * seed + start)
            drawn = draw.clips(len(some)) if self.settings.frames > 1 else draw.pictures(len(some))
            parts.append(drawn.pixels.transpose(1, 2) / 2 + 0.5)
        return torch.cat(parts)

    def expert_samples(
        self, run: Run, pairs: list[tuple[int, int]], refined: int | None = None, extracted: int | None = None
    ) -> Tensor:
        """Pixels of a run's experts, as its plan or the refined one says, without guidance.

        Of full experts with ``extracted``, the LoRAs of this rank that are nearest to them.
        """
        plan = self.settings.plan(run.method)
        weights = load_file(self.train(run))
        specs = self.settings.specs(run.method)
        if extracted is not None:
            specs = (RoleSpec("lora", extracted, float(extracted)), specs[1])
        roles = make_roles(self.sampler, plan, specs)
        for phase in plan.phases:
            prefix = f"{phase.name}/"
            own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
            roles.load_state_dict(phase.name, own if extracted is None else self._nearest_lora(own, extracted))
        return self._sampled(roles, plan if refined is None else plan.refined(refined), pairs)

    def _nearest_lora(self, expert: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
        base = self.sampler.pipeline.transformer.state_dict()
        targets, title = self.sampler.family.lora_targets, f"rank {rank}"
        return extract(weights_of(base), weights_of(expert), targets, rank, torch.float32, title).lora

    def shipped_samples(self, pairs: list[tuple[int, int]], steps: int, strength: float = 1.0) -> Tensor:
        """Pixels of the shipped experts, in their four steps or in more."""
        return self.samples_of(PhasedExperts.open(MODELS / "experts").at_strength(strength), pairs, steps)

    def samples_of(self, experts: PhasedExperts, pairs: list[tuple[int, int]], steps: int) -> Tensor:
        """Pixels of the experts of a folder, in the steps of their plan or in more."""
        networks = {"transformer": copy.deepcopy(self.sampler.pipeline.transformer)}
        roles = roles_from_experts(experts, networks, self.sampler.family, TeacherRouting())
        return self._sampled(roles, experts.manifest.plan.refined(steps), pairs)

    def _sampled(self, roles: Roles, plan: PhasePlan, pairs: list[tuple[int, int]]) -> Tensor:
        latents = []
        for start in range(0, len(pairs), _BATCH):
            part = pairs[start : start + _BATCH]
            noise = self.sampler.noise([seed for _, seed in part])
            conditioning = self.sampler.prompts.conditioning(torch.tensor([prompt for prompt, _ in part]), noise.device)
            latents.append(sample(route(expert_velocities(roles, plan, conditioning), plan), plan.sigmas, noise))
        return self.decode(torch.cat(latents))

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in [0, 1]; what is not finite becomes black. Single frames are convolved in two dimensions, faster."""
        if self.settings.frames == 1:
            with mock.patch.object(WanCausalConv3d, "forward", one_frame_convolution):
                pixels = self.sampler.decode(latents)
        else:  # in parts that caches hold
            parts = tqdm(latents.split(_CLIPS_DECODED), desc="decode", leave=False)
            pixels = torch.cat([self.sampler.decode(part, None) for part in parts])
        return pixels.nan_to_num(0.0, 1.0, 0.0)

    # --- trainings ------------------------------------------------------------

    def train(self, run: Run) -> Path:
        """The weights of a run's experts; trained unless they are there."""
        path = self.folder / "experts" / f"{run.name}.safetensors"
        if not path.exists():
            with tqdm(total=run.updates, desc=run.name, unit="update", leave=False) as bar:
                start, problem = time.process_time(), EmbeddedProblem(run, self.sampler, self.settings)
                done = distil(problem, run, self.settings.recipe_of(run.method), bar.update)
                seconds = time.process_time() - start
            weights = {f"{name}/{key}": value for name, own in done.experts.items() for key, value in own.items()}
            metadata = {"evaluations": json.dumps(done.evaluations), "skipped": json.dumps(done.skipped)}
            metadata["processor_seconds"] = json.dumps(round(seconds, 1))
            write_tensors(path, weights, metadata)
        return path

    # --- rows ------------------------------------------------------------

    @cached_property
    def reference(self) -> Features:
        """Of the teacher's many-step samples."""

        def look() -> Features:
            pixels = self.teacher_samples(self.measuring.teacher_steps, self.pairs(_REFERENCE_SEED))
            return self.measures.look(pixels).features

        return self._features("reference", look)

    @cached_property
    def data(self) -> Features:
        """Of real scenes."""
        return self._features("data", lambda: self.measures.look(self.data_samples(-1)).features)

    def _features(self, name: str, look: Callable[[], Features]) -> Features:
        path = self.measured / f"{name}.safetensors"
        if not path.exists():
            write_tensors(path, look().to_tensors(), {})
        return Features.from_tensors(load_file(path))

    def has_row(self, run: Run, refined: int | None = None, extracted: int | None = None) -> bool:
        """Whether a run was trained and measured, in the steps of its plan or in more."""
        return self._row_path(_row_name(run, refined, extracted)).exists()

    def _row_path(self, name: str) -> Path:
        return self.measured / "rows" / f"{name}.json"

    def row(self, run: Run, refined: int | None = None, extracted: int | None = None) -> Row:
        """Train and measure a run, in the steps of its plan or in more, or read what is there.

        With ``extracted``, what is measured of its full experts are the nearest LoRAs of this rank.
        """
        path = self._row_path(_row_name(run, refined, extracted))
        if not path.exists():
            with safe_open(self.train(run), "pt") as file:
                metadata = file.metadata()
            evaluations: dict[str, int] = json.loads(metadata["evaluations"])
            pixels = self.expert_samples(run, self.pairs(noise_seed(run.seed)), refined, extracted)
            measured = self.measures.look(pixels)
            extra: dict[str, Any] = {
                "training_evaluations": sum(evaluations.values()),
                "skipped_updates": json.loads(metadata["skipped"]),
                "processor_seconds": json.loads(metadata.get("processor_seconds", "null")),
            }
            steps = refined or sum(run.method.steps)
            write_row(path, self._row(run.method.key, run.seed, steps, measured, run.lr, run.updates, extra))
        return read_row(path)

    def has_reference(self, name: str, seed: int) -> bool:
        """Whether what needs no training was measured."""
        return self._row_path(f"{name}-seed-{seed}").exists()

    def reference_row(self, name: str, seed: int) -> Row:
        """Measure what needs no training, or read what is there.

        Names are ``data``, ``teacher_<steps>``, and ``experts_<steps>`` or ``experts_<steps>_at_<strength of the
        LoRAs>`` of the shipped experts.
        """
        path = self._row_path(f"{name}-seed-{seed}")
        if not path.exists():
            evaluations = 0
            if name == "data":
                pixels = self.data_samples(seed)
            elif name.startswith("experts_"):
                steps, *strength = name.removeprefix("experts_").split("_at_")
                evaluations = int(steps)
                pixels = self.shipped_samples(self.pairs(noise_seed(seed)), evaluations, *map(float, strength))
            else:
                evaluations = int(name.removeprefix("teacher_"))
                pixels = self.teacher_samples(evaluations, self.pairs(noise_seed(seed)))
                evaluations *= 1 if self.settings.guidance_scale == 1 else 2
            write_row(path, self._row(name, seed, evaluations, self.measures.look(pixels), None, 0, {}))
        return read_row(path)

    def _row(
        self,
        method: str,
        seed: int,
        evaluations: int,
        measured: Measured,
        lr: float | None,
        updates: int,
        extra: dict[str, Any],
    ) -> Row:
        seeds, resamples = self.measuring.seeds, self.measuring.resamples
        columns = distances(measured.features, self.reference, self.data, seeds, resamples)
        frechet = float(columns.pop("frechet") or 0.0)
        return Row(
            teacher=self.teacher,
            method=method,
            seed=seed,
            network_evaluations=evaluations,
            frechet=frechet,
            diversity=measured.diversity,
            motion=measured.motion,
            lr=lr,
            updates=updates,
            score=frechet,
            extra={**columns, **measured.extra, **extra},
        )


def _row_name(run: Run, refined: int | None, extracted: int | None) -> str:
    more = {"refined": refined, "extracted": extracted}
    return "-".join([run.name, *(f"{name}-{value}" for name, value in more.items() if value is not None)])


def noise_seed(seed: int) -> int:
    """The same for all methods at one seed."""
    return 10_000 * seed
