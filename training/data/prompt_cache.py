"""Conditioning tensors of all examples: computed once, kept on disk, read from there batch by batch.

A bank is a folder named after everything that it depends on, with chunks of a fixed number of examples of one bucket.
Chunks that are complete are not computed again, so that encoding that was stopped goes on, and several processes share
the work. Every file holds a digest of what is in it; one that is not what was written is encoded again, in place, while
other runs may read it. Tokens of a prompt are kept without the zeros after them.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pdmd_core.experts.errors import ExpertsError
from pdmd_core.experts.format.header import read_header
from pdmd_core.experts.format.mapped import MappedFile
from pdmd_core.families import ModelFamily
from training.data.buckets import ANY, Bucket, SampleSize, bucket_of
from training.data.encoder import Encoder
from training.data.examples import Example, PromptError
from training.data.prompt_identity import CHUNK, identity
from training.data.teacher import TeacherSource
from training.distributed.processes import of_first_process, process_number
from training.monitoring.bars import progress_bar

INDEX, NEGATIVE = "index.json", "negative.safetensors"
DIGEST = "sha256"
OF_NEGATIVE = "negative."
LENGTHS = ".lengths"


class PromptCache:
    """Conditioning tensors of examples, read from a folder that ``open_prompt_cache`` has written.

    Examples are named by their place in the data. A batch is of one bucket, because images have its size.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self.identity: str = folder.name
        self.widths: dict[str, int] = index["widths"]
        self.longer: int = index.get("longer", 0)
        """Prompts that were cut off at ``max_sequence_length``."""
        chunks = index["chunks"]
        self._buckets = torch.tensor([bucket for bucket, rows in chunks for _ in rows], dtype=torch.int16)
        places = torch.tensor([[chunk, row] for chunk, (_, rows) in enumerate(chunks) for row in range(len(rows))])
        order = torch.tensor([example for _, rows in chunks for example in rows]).argsort()
        self._buckets, self._places = self._buckets[order], places[order]
        self._negative = self._read(folder / NEGATIVE, 0) if (folder / NEGATIVE).exists() else {}
        self._held: list[dict[str, Tensor]] | None = None

    def in_memory(self) -> PromptCache:
        """This bank, which needs its folder no more: for few examples."""
        self._held = self._rows(torch.arange(len(self)))
        return self

    def __len__(self) -> int:
        return len(self._places)

    def members(self, bucket: int) -> Tensor:
        """Indices of the examples that suit this bucket."""
        return ((self._buckets == bucket) | (self._buckets == ANY)).nonzero().flatten()

    def sized(self, bucket: int) -> int:
        """How many examples belong to this bucket and to no other."""
        return int((self._buckets == bucket).sum())

    def prompts(self, indices: Iterable[int]) -> list[str]:
        """The prompts of these examples."""
        found = []
        for index in indices:
            chunk, row = self._places[index].tolist()
            file, _ = _opened(self._chunk(chunk))
            found.append(json.loads(file.header.metadata["prompts"])[row])
        return found

    def conditioning(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        """Read the conditioning of examples (batch,) as tensors (batch, ...) on a device."""
        return _stacked([_positive(row) for row in self._rows(indices)], device)

    def conditioning_pair(self, indices: Tensor, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Read the conditioning of both sides of guidance, each example once.

        Args:
            indices: Examples, shape (batch,).
            device: Where the tensors go.

        Returns:
            ``conditioning``, and the same with the negative prompt in place of the examples' own; what does not depend
            on the prompt, as an image, is one tensor in both.
        """
        rows = self._rows(indices)
        positive = _stacked([_positive(row) for row in rows], device)
        return positive, positive | _stacked([self._negative | _own_negative(row) for row in rows], device)

    def _rows(self, indices: Tensor) -> list[dict[str, Tensor]]:
        if self._held is not None:
            return [self._held[index] for index in indices.tolist()]
        return [self._read(self._chunk(chunk), row) for chunk, row in self._places[indices].tolist()]

    def _chunk(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def _read(self, path: Path, row: int) -> dict[str, Tensor]:
        """One row of a file; prompts with the zeros after their tokens again."""
        file, ends = _opened(path)
        found = {}
        for name in file.header.specs:
            if name.endswith(LENGTHS):
                continue
            values = file.tensor(name)
            if name not in ends:
                found[name] = values[row]
                continue
            start, end = ends[name][row], ends[name][row + 1]
            width = self.widths[name.removeprefix(OF_NEGATIVE)]
            padded = values.new_zeros(width, *values.shape[1:])
            padded[: end - start] = values[start:end]
            found[name] = padded
        return found


@lru_cache(maxsize=64)
def _opened(path: Path) -> tuple[MappedFile, dict[str, list[int]]]:
    """A file of a bank, and where the rows of its tensors without padding start. Raises PromptError."""
    try:
        file = MappedFile(path)
    except ExpertsError:
        raise PromptError(f"{path}: damaged since this run began; start again, it is encoded anew then") from None
    names = [name for name in file.header.specs if name.endswith(LENGTHS)]
    return file, {name.removesuffix(LENGTHS): [0, *file.tensor(name).cumsum(0).tolist()] for name in names}


def _positive(row: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in row.items() if not name.startswith(OF_NEGATIVE)}


def _own_negative(row: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of encoders that see the image with the prompt: what the negative prompt is for this example alone."""
    return {name.removeprefix(OF_NEGATIVE): value for name, value in row.items() if name.startswith(OF_NEGATIVE)}


def _stacked(rows: Sequence[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}


def open_prompt_cache(
    examples: Iterable[Example],
    negative_prompt: str,
    encoder: Encoder,
    buckets: Sequence[Bucket],
    cache_dir: Path,
    dtype: torch.dtype = torch.float32,
    check: Callable[[str], None] | None = None,
) -> PromptCache:
    """Conditioning as the teacher's pipeline computes it, or what an earlier run left in ``cache_dir``.

    examples are iterated twice, for what identifies them and to encode them. dtype: of the prompts' tensors; that of
    the network loses nothing, since it takes them in no other. check: told the identity before anything is encoded. All
    processes call this together. Raises PromptError.
    """
    folder = cache_dir / of_first_process(lambda: identity(examples, negative_prompt, encoder, buckets, dtype))
    if check is not None:
        check(folder.name)
    found = of_first_process(lambda: examined(folder))
    for name, problem in found.items():
        if problem and process_number()[0] == 0:
            print(f"warning: {folder / name} is damaged ({problem}): it is encoded again", file=sys.stderr)
    if INDEX not in found or any(found.values()):
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, examples, negative_prompt, encoder, buckets, dtype, found)
    _opened.cache_clear()  # what this process has open may be a file that another one has mended since
    return PromptCache(folder)


def examined(folder: Path) -> dict[str, str | None]:
    """What is wrong with each file of a bank, None where it is what was written; of files that its index misses too."""
    found = {path.name: _problem(path) for path in sorted(folder.glob("*.safetensors"))}
    if (folder / INDEX).exists() and (problem := _problem(folder / INDEX)):
        found[INDEX] = problem
    elif (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        found |= {name: "missing" for name in index["files"] if name not in found}
        found[INDEX] = None
    return found


def _problem(path: Path) -> str | None:
    """What is wrong with a file; None when it is what was written."""
    try:
        if path.name == INDEX:
            values = json.loads(path.read_text(encoding="utf-8"))
            return None if values.pop(DIGEST, None) == digest_of_tensors(path, {}, values) else "not what was written"
        file = MappedFile(path)
        metadata = dict(file.header.metadata)
        digest = metadata.pop(DIGEST, None)
        found = digest_of_tensors(path, {name: file.tensor(name) for name in file.header.specs}, metadata)
    except (OSError, ValueError, AttributeError) as error:  # ValueError: of JSON, and ExpertsError
        return " ".join(str(error).removeprefix(f"{path}: ").split())[:100] or type(error).__name__
    if digest is None:
        return "written without a digest"
    return None if digest == found else "not what was written"


def digest_of_tensors(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> str:
    """SHA-256 of what a file of a cache holds, and of its place there."""
    digest = hashlib.sha256(json.dumps([path.parent.name, path.name, values], sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def encode_examples(
    examples: Sequence[Example],
    negative_prompt: str,
    source: TeacherSource,
    family: ModelFamily,
    size: SampleSize,
    cache_dir: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PromptCache:
    """Conditioning of a few examples that are all of one size; ``cache_dir`` may go afterwards. Raises PromptError.

    dtype: of the encoder of prompts.
    """
    encoder = Encoder(source, family, size.max_sequence_length, device, dtype=dtype)
    bucket = Bucket(size.width, size.height, size.frames)
    try:
        return open_prompt_cache(examples, negative_prompt, encoder, [bucket], cache_dir).in_memory()
    finally:
        encoder.close()


def _write(
    folder: Path,
    examples: Iterable[Example],
    negative_prompt: str,
    encoder: Encoder,
    buckets: Sequence[Bucket],
    dtype: torch.dtype,
    found: Mapping[str, str | None],
) -> None:
    """Write what is not whole of a bank, and its index last. found: what is wrong with the files that are there."""
    rank, processes = process_number()
    whole = {name for name, problem in found.items() if not problem}
    chunks = []
    for number, (bucket, rows, part) in enumerate(
        _chunks(progress_bar(examples, desc="encode", disable=rank > 0), buckets)
    ):
        chunks.append((bucket, rows))
        path = folder / f"{number:06d}.safetensors"
        if number % processes == rank and path.name not in whole:
            size = None if bucket == ANY else buckets[bucket]
            texts = encoder.texts(part, size)
            texts |= {OF_NEGATIVE + k: v for k, v in encoder.negatives(negative_prompt, part, size).items()}
            prompts = [example.prompt for example in part]
            _save(path, _in(dtype, texts), encoder.images(part, size), prompts, encoder.longer(part))
    if rank == 0:
        negative = encoder.negative(negative_prompt)
        if negative and NEGATIVE not in whole:
            _save(folder / NEGATIVE, _in(dtype, negative), {}, [negative_prompt])
        files = [f"{number:06d}.safetensors" for number in range(len(chunks))]
        for number, name in enumerate(files):
            if number % processes:  # of another process; torchrun ends all of them when one fails
                _wait_for(folder / name)
        files += [NEGATIVE] if negative else []
        widths: dict[str, int] = {}
        longer = 0
        for name in files:
            metadata = read_header(folder / name).metadata
            longer += int(metadata.get("longer", 0))
            for tensor, width in json.loads(metadata["widths"]).items():
                tensor = tensor.removeprefix(OF_NEGATIVE)
                widths[tensor] = max(width, widths.get(tensor, 0))
        values = {"chunks": [list(chunk) for chunk in chunks], "widths": widths, "files": files, "longer": longer}
        temporary = folder / f"{INDEX}.{secrets.token_hex(4)}.part"
        text = json.dumps(values | {DIGEST: digest_of_tensors(folder / INDEX, {}, values)})
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / INDEX)
    for name in [*(found if rank else ()), INDEX]:
        _wait_for(folder / name)


def _wait_for(path: Path) -> None:
    """Wait until another process has written a file."""
    while _problem(path):
        time.sleep(0.2)


def _chunks(examples: Iterable[Example], buckets: Sequence[Bucket]) -> Iterator[tuple[int, list[int], list[Example]]]:
    """Bucket, places and examples of every chunk; the same whoever asks."""
    waiting: dict[int, list[tuple[int, Example]]] = {}
    for place, example in enumerate(examples):
        bucket = bucket_of(example, buckets)
        rows = waiting.setdefault(bucket, [])
        rows.append((place, example))
        if len(rows) == CHUNK:
            yield bucket, *map(list, zip(*waiting.pop(bucket), strict=True))  # type: ignore[misc]
    for bucket, rows in sorted(waiting.items()):
        yield bucket, *map(list, zip(*rows, strict=True))  # type: ignore[misc]


def _save(path: Path, texts: dict[str, Tensor], images: dict[str, Tensor], prompts: list[str], longer: int = 0) -> None:
    tensors = dict(images)
    for name, value in texts.items():
        lengths = [_length(row) for row in value]
        tensors[name] = torch.cat([row[:length] for row, length in zip(value, lengths, strict=True)])
        tensors[name + LENGTHS] = torch.tensor(lengths)
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    widths = {name: value.shape[1] for name, value in texts.items()}
    temporary = path.with_suffix(f".{secrets.token_hex(4)}.part")  # another run may write it too
    metadata = {"prompts": json.dumps(prompts), "widths": json.dumps(widths), "longer": str(longer)}
    save_file(tensors, temporary, metadata | {DIGEST: digest_of_tensors(path, tensors, metadata)})
    temporary.replace(path)


def _length(row: Tensor) -> int:
    """Tokens (tokens, ...) up to the last one that is not zero."""
    used = row.flatten(1).any(1) if row.ndim > 1 else row.bool()
    return int(used.nonzero().max()) + 1 if used.any() else 0


def _in(dtype: torch.dtype, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
