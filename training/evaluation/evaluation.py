"""Sampling and measuring the methods of a report; what is there already is not computed again."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pdmd_core.experts import PhasedExperts
from pdmd_core.hashing import digest_of
from training.config.command_line import UserError
from training.data.buckets import SampleSize
from training.data.examples import Example
from training.data.teacher import TeacherSource
from training.evaluation.cache import TensorCache
from training.evaluation.comparison import METRICS, Measurement, Rows, Setting
from training.evaluation.identity import FileHashes, example_identity, experts_identity, teacher_identity
from training.evaluation.measures import Measure, Pixels
from training.evaluation.real_data import data_files, read_sample
from training.evaluation.sampler import Decoder, Sampler, decoded_at_once

REFERENCE_SEED = 1_000_000
"""Seeds of the reference start here, those of the methods at 0."""


@dataclass(frozen=True)
class Method:
    """What samples are made with: experts as their plan says, or the teacher in some steps."""

    name: str
    experts: PhasedExperts | None = None
    steps: int = 0
    """Of the teacher."""
    first_seed: int = 0

    @property
    def calls(self) -> int:
        """Network calls for one batch, guidance not counted."""
        return len(self.experts.manifest.plan.sigmas) if self.experts else self.steps


@dataclass(frozen=True)
class Teacher:
    """The teacher and how it samples."""

    source: TeacherSource
    shift: float
    guidance_scale: float
    negative_prompt: str = ""

    @property
    def guided(self) -> bool:
        """Whether it takes two evaluations a step."""
        return self.guidance_scale != 1


@dataclass(frozen=True)
class Machine:
    """Where and how networks run. None: a GPU if there is one; a moderate number of samples."""

    device: str | None = None
    batch: int | None = None
    dtype: torch.dtype = torch.float32


class Evaluation:
    """Prompts and seeds, and everything that was computed for them, in ``cache_dir``.

    Samples are kept by what decides them (weights, plan, steps, guidance, size, dtype, prompt, seed), so that more
    seeds, prompts, methods and metrics are added to what is there.
    """

    def __init__(
        self,
        teacher: Teacher,
        size: SampleSize,
        examples: Sequence[Example],
        seeds: int,
        cache_dir: Path,
        machine: Machine | None = None,
    ) -> None:
        if seeds < 1:
            raise UserError(f"--seeds: expected at least 1 sample for each prompt, found {seeds}")
        self.teacher, self.size, self.seeds = teacher, size, seeds
        self.cache_dir, self.machine = cache_dir, machine or Machine()
        self.hashes = FileHashes(cache_dir / "hashes.json")
        self._teacher_identity = teacher_identity(teacher.source, self.hashes)
        unique: dict[str, Example] = {}
        for example in examples:
            unique.setdefault(example_identity(example, self.hashes), example)
        self.examples, self._example_ids = list(unique.values()), list(unique)
        self._decoder: Decoder | None = None

    # --- samples ------------------------------------------------------------

    def evaluations(self, method: Method) -> int:
        """Network evaluations for one sample, guidance counted as two."""
        return method.calls * (2 if not method.experts and self.teacher.guided else 1)

    def ids(self, method: Method) -> list[str]:
        """Of a method's samples, prompt by prompt."""
        seeds = range(method.first_seed, method.first_seed + self.seeds)
        return [f"{example}-{seed}" for example in self._example_ids for seed in seeds]

    def _pairs(self, method: Method) -> dict[str, tuple[int, int]]:
        """Id to (example, seed)."""
        seeds = range(method.first_seed, method.first_seed + self.seeds)
        pairs = [(index, seed) for index in range(len(self.examples)) for seed in seeds]
        return dict(zip(self.ids(method), pairs, strict=True))

    def _folder(self, method: Method) -> Path:
        """Where a method's samples are: named after everything that changes them but prompt and seed."""
        size = [self.size.height, self.size.width, self.size.frames, self.size.max_sequence_length]
        if method.experts:
            how: dict[str, object] = {"experts": experts_identity(method.experts.manifest)}
        else:
            how = {"steps": method.steps, "shift": self.teacher.shift, "guidance_scale": self.teacher.guidance_scale}
            how |= {"negative_prompt": self.teacher.negative_prompt} if self.teacher.guided else {}
        how |= {"teacher": self._teacher_identity, "size": size, "dtype": str(self.machine.dtype), "version": 1}
        folder = self.cache_dir / "samples" / digest_of(how)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "method.json").write_text(json.dumps(how, indent=2) + "\n", encoding="utf-8")
        return folder

    def _latents(self, method: Method) -> TensorCache:
        return TensorCache(self._folder(method) / "latents")

    def sample(self, methods: Sequence[Method]) -> None:
        """Make the samples that are missing, experts first: they are quick, and what is wrong with them shows at once.

        Raises UserError and ExpertsError.
        """
        owners = {id(method.experts): method.experts for method in methods}
        for owner in sorted(owners.values(), key=lambda experts: experts is None):
            own = [method for method in methods if method.experts is owner]
            todo = [
                (method, store, store.missing(self.ids(method))) for method in own for store in [self._latents(method)]
            ]
            if not any(ids for _, _, ids in todo):
                continue
            try:
                sampler = self._sampler(owner)
                for method, store, ids in todo:
                    self._fill(sampler, method, store, ids)
            except torch.OutOfMemoryError:
                raise UserError(
                    "the device ran out of memory; what was sampled is kept. Use --dtype bfloat16, or --batch_size "
                    "smaller than it was, and run the same command again"
                ) from None
            del sampler  # two teachers do not fit in memory
            _free()

    def _sampler(self, experts: PhasedExperts | None) -> Sampler:
        source, machine = self.teacher.source, self.machine
        return Sampler(
            source.path,
            self.size,
            self.examples,
            self.cache_dir,
            experts,
            machine.batch,
            machine.device,
            source.pipeline,
            machine.dtype,
            self.teacher.negative_prompt,
            source.revision,
        )

    def _fill(self, sampler: Sampler, method: Method, store: TensorCache, ids: Sequence[str]) -> None:
        pairs = self._pairs(method)
        parts = [ids[i : i + sampler.batch] for i in range(0, len(ids), sampler.batch)]
        with tqdm(total=len(parts) * method.calls, desc=f"sample {method.name}", unit="step") as bar:
            for part in parts:
                wanted = [pairs[name] for name in part]
                start = time.perf_counter()
                if method.experts:
                    latents = sampler.with_experts(wanted, None, bar.update)
                else:
                    latents = sampler.with_teacher(
                        wanted, method.steps, self.teacher.shift, self.teacher.guidance_scale, None, bar.update
                    )
                latents = latents.cpu()
                seconds = (time.perf_counter() - start) / len(part)
                for (index, seed), sample in zip(wanted, latents, strict=True):
                    if not bool(sample.isfinite().all()):
                        raise UserError(
                            f"{method.name}: seed {seed} of {self.examples[index].prompt[:40]!r} has values that are "
                            f"not finite: use another --dtype than {str(self.machine.dtype)[6:]}, or train anew"
                        )
                store.add(part, {"latents": latents, "seconds": torch.full((len(part),), seconds)})

    def seconds(self, method: Method) -> float:
        """Time that sampling took, whenever it was."""
        return float(self._latents(method).rows(self.ids(method), ["seconds"])["seconds"].sum())

    # --- what is seen in samples ------------------------------------------------------------

    def look(self, method: Method, measures: Sequence[Measure]) -> Rows:
        """What the measures see in a method's samples, in the order of ``ids``; samples must be there."""
        ids, folder = self.ids(method), self._folder(method)
        stores = {m.name: TensorCache(folder / f"{m.name}-{m.identity}") for m in measures}
        missing = [name for name in dict.fromkeys(ids) if any(name not in store for store in stores.values())]
        if missing:
            latents = self._latents(method)
            for part in _parts(missing, decoded_at_once(self.size), f"look at {method.name}"):
                self._add(stores, measures, part, self._decode(latents.rows(part, ["latents"])["latents"]))
        return {name: store.rows(ids) for name, store in stores.items()}

    def look_at_data(self, folder: Path, measures: Sequence[Measure]) -> Rows:
        """What the measures see in the pictures or clips of a folder. Raises UserError."""
        size = [self.size.height, self.size.width, self.size.frames]
        files = {digest_of(self.hashes(path), size): path for path in data_files(folder, self.size)}
        stores = {m.name: TensorCache(self.cache_dir / "data" / f"{m.name}-{m.identity}") for m in measures}
        missing = [name for name in files if any(name not in store for store in stores.values())]
        for part in _parts(missing, decoded_at_once(self.size), "look at the data"):
            self._add(stores, measures, part, torch.stack([read_sample(files[name], self.size) for name in part]))
        return {name: store.rows(list(files)) for name, store in stores.items()}

    def _decode(self, latents: Tensor) -> Tensor:
        if self._decoder is None:
            self._decoder = Decoder(self.teacher.source, self.size, self.machine.device)
        return self._decoder(latents)

    @staticmethod
    def _add(stores: dict[str, TensorCache], measures: Sequence[Measure], ids: Sequence[str], pixels: Tensor) -> None:
        seen = Pixels(pixels)
        for measure in measures:
            if stores[measure.name].missing(ids):
                stores[measure.name].add(ids, measure(seen))


def compare(
    setting: Setting, names: Sequence[str], methods: Sequence[tuple[str, Rows]], reference: Rows
) -> dict[str, list[Measurement]]:
    """Every metric of these names for every method, by method; the bar counts both, since bootstraps take time."""
    found: dict[str, list[Measurement]] = {method: [] for method, _ in methods}
    with tqdm(total=len(names) * len(methods), desc="metrics", leave=False) as bar:
        for name in names:
            for method, rows in methods:
                metric = METRICS[name]
                for measured in metric.measure(setting, rows, reference):
                    found[method].append(replace(measured, column=replace(measured.column, source=metric.source)))
                bar.update()
    return found


def _parts(ids: Sequence[str], size: int, label: str) -> tqdm[list[str]]:
    parts = [list(ids[i : i + size]) for i in range(0, len(ids), size)]
    return tqdm(parts, desc=label, unit="batch", disable=not parts)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
