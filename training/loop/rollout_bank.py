"""A bank of rollouts: what the frozen experts of earlier phases make of noise, made once and kept on disk.

Where experts denoise it is what the guided teacher makes of noise, in all phases the same.
"""

from __future__ import annotations

import hashlib
import secrets
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pdmd_core.batch import Batch
from pdmd_core.distillation import PhasedDistiller
from pdmd_core.experts.errors import ExpertsError
from pdmd_core.experts.format.mapped import MappedFile
from pdmd_core.hashing import digest_of
from pdmd_core.rollout import before_step
from pdmd_core.velocities import expert_velocities
from training.data.order import ExampleOrder
from training.data.prompt_cache import digest_of_tensors
from training.distributed.processes import of_first_process
from training.distributed.sharding import gathered
from training.loop.build import BuiltRun
from training.monitoring.bars import progress_bar

CHUNK = 64
"""Samples in a file."""


class RolloutBank:
    """Samples at the first sigma of a phase, or the teacher's, read from the files that ``open_bank`` has written.

    Args:
        folder: Where the files are.
        chunks: For each file the places in the bank of its samples.
        examples: The index of each sample's example, shape (samples,).
    """

    def __init__(self, folder: Path, chunks: list[list[int]], examples: Tensor) -> None:
        self.folder, self.examples = folder, examples
        self._places = {place: (number, row) for number, rows in enumerate(chunks) for row, place in enumerate(rows)}

    def rows(self, indices: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Read samples of one size.

        Args:
            indices: Their places in the bank, shape (batch,).
            device: Where they go.

        Returns:
            The samples, of shape (batch, ...), and the indices of their examples.
        """
        found = []
        for number, row in (self._places[index] for index in indices.tolist()):
            found.append(MappedFile(_file(self.folder, number)).tensor("samples")[row])
        return torch.stack(found).to(device), self.examples[indices]


def open_bank(run: BuiltRun, phase: int) -> tuple[RolloutBank, ExampleOrder]:
    """Make the bank of a phase, or find what was made of it. All processes call this together and share the work.

    A sample depends on the seed and its place in the bank, and on everything before the phase; that names the folder.
    What is there and whole is not made again, by however many processes.

    Args:
        run: The run, whose experts of earlier phases are what they stay.
        phase: Index of the phase, at least 1 but where the samples are the teacher's.

    Returns:
        The bank, and the order in which updates draw from it.

    Raises:
        OSError: If a file cannot be written.
    """
    config, data, count = run.config, run.data, run.config.rollouts.bank or 0
    folder = (config.data.cache_dir or config.output_dir / "cache") / f"rollouts-{_identity(run, phase)}"
    order = ExampleOrder(data.order.members, data.order.shares, config.seed)
    drawn = [order.draw(1) for _ in range(count)]
    buckets, examples = [bucket for bucket, _ in drawn], torch.cat([index for _, index in drawn])
    members = [[k for k in range(count) if buckets[k] == bucket] for bucket in range(len(data.shapes))]
    chunks = [rows[i : i + CHUNK] for rows in members for i in range(0, len(rows), CHUNK)]
    missing = of_first_process(lambda: [n for n in range(len(chunks)) if not _whole(_file(folder, n))])
    bar = progress_bar(
        missing,
        desc="teacher's samples" if _of_teacher(run) else "rollouts",
        disable=not run.accelerator.is_main_process,
    )
    for number in bar:
        shape = data.shapes[buckets[chunks[number][0]]]
        samples = _make(run, phase, chunks[number], examples[chunks[number]], shape)
        if run.accelerator.is_main_process:
            _write(_file(folder, number), samples)
    run.accelerator.wait_for_everyone()
    own, shares = [torch.tensor(rows, dtype=torch.long) for rows in members], [float(len(rows)) for rows in members]
    return RolloutBank(folder, chunks, examples), ExampleOrder(own, shares, config.seed + 1)


@torch.no_grad()
def _make(run: BuiltRun, phase: int, places: list[int], examples: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Samples at these places; every group of processes makes as many as each other one: networks may be in shards."""
    config, accelerator = run.config, run.accelerator
    together, count = config.parallel.context_parallel, len(places)
    groups = accelerator.num_processes // together
    share = -(-count // groups)
    distiller = PhasedDistiller(run.plan, phase, run.roles, config.objective, config.memory.guidance_batched)
    own = torch.arange(groups * share).clamp(max=count - 1)[accelerator.process_index // together * share :][:share]
    parts = []
    for rows in own.split(config.memory.micro_batch_size or share):
        noise = torch.stack(
            [_noise(config.seed, _maker(run, phase), places[row], shape, accelerator.device) for row in rows.tolist()]
        )
        with accelerator.autocast():
            if distiller.denoises:
                batch = Batch(noise, *run.data.prompts.conditioning_pair(examples[rows], accelerator.device))
                parts.append(distiller.teacher_samples(batch).float())
                continue
            conditioning = run.data.prompts.conditioning(examples[rows], accelerator.device)
            experts = expert_velocities(run.roles, run.plan, conditioning)
            parts.append(before_step(experts, run.plan, phase, 0, noise).float())
    found = accelerator.gather(torch.cat(parts)).cpu().unflatten(0, (-1, share))
    return found[::together].flatten(0, 1)[:count].contiguous()


def _of_teacher(run: BuiltRun) -> bool:
    """Whether the samples are the teacher's."""
    return run.config.objective.expert_loss == "denoising"


def _maker(run: BuiltRun, phase: int) -> str:
    """What makes the samples: the guided teacher, or the experts of phases before this one, named by its index."""
    objective = run.config.objective
    if _of_teacher(run):
        return f"teacher, guidance {objective.guidance_scale!r}, {objective.path_steps} steps"
    return str(phase)


def _noise(seed: int, maker: str, place: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    digest = hashlib.sha256(f"{seed} bank {maker} {place}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7]))
    return torch.randn(shape, generator=generator, device=device)


def _identity(run: BuiltRun, phase: int) -> str:
    """Everything that the samples depend on, by content. All processes ask together."""
    config, experts = run.config, hashlib.sha256()
    for earlier in run.plan.phases[: 0 if _of_teacher(run) else phase]:
        for name, value in sorted(run.roles.state_dict(earlier.name).items()):
            own = gathered(value).to("cpu", torch.float32)
            experts.update(f"{earlier.name} {name} {tuple(own.shape)}".encode())
            experts.update(own.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest_of(
        1,
        [run.teacher, experts.hexdigest(), run.data.prompts.identity, [list(shape) for shape in run.data.shapes]],
        [run.data.order.shares, _maker(run, phase), run.plan.to_dict(), config.rollouts.bank, config.seed],
        [config.model.dtype, config.model.quantization, config.precision],
    )[:24]


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


def _whole(path: Path) -> bool:
    """Whether a file is what was written; one that is damaged is said, and made again."""
    if not path.is_file():
        return False
    try:
        file = MappedFile(path)
        if file.header.metadata.get("sha256") == digest_of_tensors(path, {"samples": file.tensor("samples")}, {}):
            return True
        problem = "not what was written"
    except (OSError, ExpertsError) as error:
        problem = " ".join(str(error).split())[:100]
    print(f"warning: {path} is damaged ({problem}): its samples are made again", file=sys.stderr)
    return False


def _write(path: Path, samples: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{secrets.token_hex(4)}.part")
    save_file({"samples": samples}, part, {"sha256": digest_of_tensors(path, {"samples": samples}, {})})
    part.replace(path)
