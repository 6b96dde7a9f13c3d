"""Sampling and measuring the methods of a report; what is there already is not computed again."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pdmd_core.experts import PhasedExperts
from pdmd_core.hashing import digest_of
from training.config.command_line import UserError
from training.data.buckets import SampleSize
from training.data.examples import Example
from training.evaluation.cache import TensorCache
from training.evaluation.identity import FileHashes, example_identity, experts_identity, teacher_identity
from training.evaluation.measures import Measure, Pixels
from training.evaluation.methods import Method, Teacher
from training.evaluation.quantities import Rows
from training.evaluation.real_data import data_files, read_sample
from training.evaluation.sampler import Decoder, Offload, Sampler, decoded_at_once
from training.memory.decoding import Decoding
from training.memory.quantization import Quantization
from training.monitoring.bars import progress_bar


@dataclass(frozen=True)
class Machine:
    """Where and how networks run."""

    device: str | None = None
    """A device of torch; a GPU if there is one when None."""
    batch: int | None = None
    """Samples at once; a moderate number for their size when None."""
    dtype: torch.dtype = torch.float32
    """The dtype of the networks."""
    offload: Offload = "none"
    """What waits in host memory."""
    decoding: Decoding = "auto"
    """How latents are decoded."""


class Evaluation:
    """Prompts and seeds, and everything that was computed for them, in a cache.

    Samples are kept by what decides them (weights, plan, steps, guidance, size, dtype, prompt, seed), so that more
    seeds, prompts, methods and metrics are added to what is there.

    Args:
        teacher: The teacher and how it samples.
        size: Of the samples.
        examples: Prompts, with images for teachers that take one; those that are there twice count once.
        seeds: Samples of each prompt.
        cache_dir: Folder of the cache, which reports may share.
        machine: Where and how networks run.

    Raises:
        UserError: When there is no sample to make.
        TeacherError: When there is no such teacher.
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
        self._caches: dict[Path, TensorCache] = {}

    # --- samples ------------------------------------------------------------

    def network_evaluations(self, method: Method) -> int:
        """Network evaluations for one sample, guidance counted as two."""
        return method.network_calls * (2 if not method.experts and self.teacher.guided else 1)

    def ids(self, method: Method) -> list[str]:
        """Names of a method's samples in the cache, prompt by prompt."""
        seeds = range(method.first_seed, method.first_seed + self.seeds)
        return [f"{example}-{seed}" for example in self._example_ids for seed in seeds]

    def _pairs(self, method: Method) -> dict[str, tuple[int, int]]:
        """Name of a sample to its prompt's index and its seed."""
        seeds = range(method.first_seed, method.first_seed + self.seeds)
        pairs = [(index, seed) for index in range(len(self.examples)) for seed in seeds]
        return dict(zip(self.ids(method), pairs, strict=True))

    def _folder(self, method: Method) -> Path:
        """Where a method's samples are: named after everything that changes them but prompt and seed."""
        size = [self.size.height, self.size.width, self.size.frames, self.size.max_sequence_length]
        if method.experts:
            how: dict[str, object] = {"experts": experts_identity(method.experts.manifest)}
            how |= {} if method.quantization == "none" else {"quantization": method.quantization}
        else:
            how = {"steps": method.steps, "shift": self.teacher.shift, "guidance_scale": self.teacher.guidance_scale}
            how |= {"negative_prompt": self.teacher.negative_prompt} if self.teacher.guided else {}
        version = 1 if self.machine.dtype == torch.float32 else 2  # of how prompts are encoded
        how |= {"teacher": self._teacher_identity, "size": size, "dtype": str(self.machine.dtype), "version": version}
        folder = self.cache_dir / "samples" / digest_of(how)
        if not (folder / "method.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "method.json").write_text(json.dumps(how, indent=2) + "\n", encoding="utf-8")
        return folder

    def _cache(self, folder: Path) -> TensorCache:
        """The rows in a folder; opening it reads every file to its end, so it is opened once."""
        if folder not in self._caches:
            self._caches[folder] = TensorCache(folder)
        return self._caches[folder]

    def _latents(self, method: Method) -> TensorCache:
        return self._cache(self._folder(method) / "latents")

    def sample(self, methods: Sequence[Method], new: bool = True) -> None:
        """Make the samples that are missing, experts first: they are quick, and what is wrong with them shows at once.

        Args:
            methods: What samples.
            new: Whether samples may be made; otherwise all have to be in the cache.

        Raises:
            UserError: When a sample is missing that may not be made, a sample is not finite, or memory runs out.
            ExpertsError: When experts do not fit the teacher.
        """
        networks = {(id(method.experts), method.quantization): method for method in methods}
        for first in sorted(networks.values(), key=lambda method: method.experts is None):
            alike = [m for m in methods if m.experts is first.experts and m.quantization == first.quantization]
            todo = [(method, self._latents(method)) for method in alike]
            missing = {method.name: cache.missing(self.ids(method)) for method, cache in todo}
            if not any(missing.values()):
                continue
            if not new:
                name, ids = next((name, ids) for name, ids in missing.items() if ids)
                raise UserError(
                    f"--no_sampling: {len(ids)} samples of {name!r} are not in {self.cache_dir}: leave the option out "
                    "to make them, or give the --cache_dir that has them"
                )
            try:
                sampler = self._sampler(first.experts, first.quantization)
                for method, cache in todo:
                    self._sample_into(cache, sampler, method, missing[method.name])
            except torch.OutOfMemoryError:
                raise UserError(
                    "the device ran out of memory; what was sampled is kept. Use --dtype bfloat16, --batch_size "
                    "smaller than it was, or --offload blocks, and run the same command again"
                ) from None
            del sampler  # two teachers do not fit in memory
            _free()

    def _sampler(self, experts: PhasedExperts | None, quantization: Quantization) -> Sampler:
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
            quantization,
            machine.offload,
            machine.decoding,
        )

    def _sample_into(self, cache: TensorCache, sampler: Sampler, method: Method, ids: Sequence[str]) -> None:
        pairs = self._pairs(method)
        parts = [ids[i : i + sampler.batch] for i in range(0, len(ids), sampler.batch)]
        with progress_bar(total=len(parts) * method.network_calls, desc=f"sample {method.name}", unit="step") as bar:
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
                cache.add(part, {"latents": latents, "seconds": torch.full((len(part),), seconds)})

    def seconds(self, method: Method) -> float:
        """The time that sampling took, whenever it was."""
        return float(self._latents(method).rows(self.ids(method), ["seconds"])["seconds"].sum())

    # --- what is measured of samples ------------------------------------------------------------

    def measure(self, method: Method, measures: Sequence[Measure]) -> Rows:
        """Measure a method's samples, which must be there.

        Args:
            method: What sampled.
            measures: What is measured.

        Returns:
            Name of the measure to its tensors, in the order of ``ids``.
        """
        ids, folder = self.ids(method), self._folder(method)
        caches = {m.name: self._cache(folder / f"{m.name}-{m.identity}") for m in measures}
        missing = [name for name in dict.fromkeys(ids) if any(name not in cache for cache in caches.values())]
        if missing:
            latents = self._latents(method)
            prompts = {name: self.examples[i].prompt for name, (i, _) in self._pairs(method).items()}
            for part in _parts(missing, decoded_at_once(self.size), f"measure {method.name}"):
                decoded = self._decode(latents.rows(part, ["latents"])["latents"])
                _add(caches, measures, part, Pixels(decoded, [prompts[name] for name in part]))
        return {name: cache.rows(ids) for name, cache in caches.items()}

    def measure_data(self, folder: Path, measures: Sequence[Measure]) -> Rows:
        """Measure real pictures or clips, brought to the size of the samples.

        Args:
            folder: Where the files are, or below it.
            measures: What is measured.

        Returns:
            Name of the measure to its tensors, one row a file.

        Raises:
            UserError: When there are not enough files, or one cannot be read.
        """
        size = [self.size.height, self.size.width, self.size.frames]
        files = {digest_of(self.hashes(path), size): path for path in data_files(folder, self.size)}
        if len(files) < 2:
            raise UserError(f"--data: expected at least 2 files that differ in {folder}, found {len(files)}")
        caches = {m.name: self._cache(self.cache_dir / "data" / f"{m.name}-{m.identity}") for m in measures}
        missing = [name for name in files if any(name not in cache for cache in caches.values())]
        for part in _parts(missing, decoded_at_once(self.size), "measure the data"):
            _add(caches, measures, part, Pixels(torch.stack([read_sample(files[name], self.size) for name in part])))
        return {name: cache.rows(list(files)) for name, cache in caches.items()}

    def source(self, method: Method) -> str:
        """What decides a method's samples, as one name."""
        return digest_of(self._folder(method).name, self.ids(method))

    def decoded(self, method: Method, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Decode samples of a method, which must be there.

        Args:
            method: What sampled.
            indices: Which of ``ids``.

        Yields:
            The index and its pixels in [0, 1] on the CPU, of shape (frames, 3, height, width).
        """
        ids = self.ids(method)
        named = {ids[i]: i for i in indices}
        for part in _parts(list(named), decoded_at_once(self.size), f"decode {method.name}"):
            for name, pixels in zip(
                part, self._decode(self._latents(method).rows(part, ["latents"])["latents"]), strict=True
            ):
                yield named[name], pixels

    def _decode(self, latents: Tensor) -> Tensor:
        if self._decoder is None:
            self._decoder = Decoder(self.teacher.source, self.size, self.machine.device, self.machine.decoding)
        return self._decoder(latents)


def _add(caches: dict[str, TensorCache], measures: Sequence[Measure], ids: Sequence[str], samples: Pixels) -> None:
    for measure in measures:
        if caches[measure.name].missing(ids):
            caches[measure.name].add(ids, measure(samples))


def _parts(ids: Sequence[str], size: int, label: str) -> tqdm[list[str]]:
    parts = [list(ids[i : i + size]) for i in range(0, len(ids), size)]
    return progress_bar(parts, desc=label, unit="batch", disable=not parts)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
