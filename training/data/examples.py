"""What a model is distilled on: prompts, with an image and a size where the data has them, read from where they lie.

Files of text, CSV and JSON lines are read line by line, everything else by the library ``datasets``; nothing is ever
held in memory as a whole but a JSON list, whose size is limited.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, AnyStr, ClassVar

from pdmd_core.checks import check_number
from pdmd_core.experts.hub.ids import is_hub_id
from training.config.command_line import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

FORMATS = (
    "a text file (.txt) with one prompt a line, .csv, .tsv, .jsonl, .ndjson, .json, .parquet, a dataset's folder or "
    "its Hub id"
)
LONGEST_LINE = 2**20
LONGEST_LIST = 2**28
"""Bytes of a JSON list, which is read as a whole."""
_FILES = {".txt", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet"}
"""Names that end in one of these are files, and no ids of the Hub, which may have dots too."""
_FURTHER = "\0further"
"""The key of values beyond the header, which no column has."""


class PromptError(UserError):
    """Prompts or images that cannot be used: one line."""


@dataclass(frozen=True)
class Example:
    """What a sample is conditioned on.

    image, last_image: a file or its content; a clip ends with the last. size: (width, height, frames) that it asks for.
    """

    prompt: str
    image: Path | bytes | None = None
    size: tuple[int, int, int | None] | None = None
    last_image: Path | bytes | None = None


@dataclass(frozen=True)
class ExampleSource:
    """Where examples are and which columns hold them.

    Raises:
        ValueError: A value cannot be; one line that starts with its name.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    prompts: str
    """Training prompts: .txt, one a line; .csv, .tsv, .jsonl, .json, .parquet; a dataset's folder or Hub id."""
    prompt_column: str = "prompt"
    """Column or key of the prompt."""
    image_column: str = "image"
    """Column or key of the image, for teachers that take one."""
    last_image_column: str = "last_image"
    """Column or key of the image that a clip ends with, for teachers that take two."""
    subset: str | None = None
    """Of a dataset: its configuration."""
    split: str = "train"
    """Of a dataset: its split."""
    revision: str | None = None
    """Of a dataset on the Hub: its revision."""
    limit: int | None = None
    """Examples that are read; all if null."""

    def __post_init__(self) -> None:
        if self.limit is not None:
            check_number("limit", self.limit, at_least=1, whole=True)

    @property
    def sizes(self) -> bool:
        """Whether the columns width, height and frames are read."""
        return False

    def __iter__(self) -> Iterator[Example]:
        """The examples in their order.

        Raises:
            PromptError: There is nothing, or it cannot be used; the text names line or row.
        """
        read = False
        for where, row in itertools.islice(self._rows(), self.limit):
            read = True
            yield self._example(where, row)
        if not read:
            raise PromptError(f"{self.prompts}: no prompts in it; expected {FORMATS}")

    def _rows(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Place and values of every row."""
        path = Path(self.prompts)
        self._check_unheard(path)
        suffix = path.suffix.lower()
        if path.is_file() and suffix != ".parquet":
            reader = _READERS.get(suffix)
            if reader is None:
                raise PromptError(f"{self.prompts}: expected {FORMATS}, found a file that ends in {path.suffix!r}")
            return reader(path, self.prompt_column)
        if path.exists() or (is_hub_id(self.prompts) and suffix not in _FILES):
            return self._dataset_rows(path)
        raise PromptError(f"{self.prompts}: no such prompt file; expected {FORMATS}")

    def _check_unheard(self, path: Path) -> None:
        """Raises PromptError for a subset or a revision of what has none."""
        if self.revision is not None and path.exists():
            raise PromptError(f"data.revision is for a dataset on the Hub, {path} lies here: leave it out")
        if self.subset is not None and (path.is_file() or _is_saved(path)):
            raise PromptError(f"data.subset is for a dataset of several, {path} is one: leave it out")

    def _dataset_rows(self, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
        rows = self._open_dataset(path)
        missing = rows.features is not None and self.prompt_column not in rows.features
        if missing:
            raise PromptError(
                f"{self.prompts}: there is no column {self.prompt_column!r}, its columns are "
                f"{', '.join(map(repr, rows.features))}: set data.prompt_column, or rename one"
            )
        number = 0
        try:
            for number, row in enumerate(rows):
                yield f"{self.prompts}, row {number}", row
        except Exception as error:  # whatever a network or a parser raises in the middle
            raise self._unreadable(f", after row {number}", error) from None

    def _unreadable(self, where: str, error: Exception) -> PromptError:
        reason = " ".join(str(error).split())
        return PromptError(f"{self.prompts}{where}: cannot be read as a dataset: {reason[:300]}")

    def _open_dataset(self, path: Path) -> Dataset | IterableDataset:
        try:
            import datasets
        except ImportError:
            raise PromptError(
                f"{self.prompts}: reading datasets and parquet needs the library datasets: "
                "pip install 'phased-dmd[data]'"
            ) from None
        try:
            if _is_saved(path):
                saved = datasets.load_from_disk(str(path))
                rows = saved[self.split] if isinstance(saved, datasets.DatasetDict) else saved
            else:
                call: dict[str, Any] = {"path": self.prompts, "name": self.subset, "revision": self.revision}
                if path.is_file():
                    call = {"path": "parquet", "data_files": {self.split: str(path)}}
                rows = datasets.load_dataset(**call, split=self.split, streaming=True)
            for column in (self.image_column, self.last_image_column):
                if rows.features and isinstance(rows.features.get(column), datasets.Image):
                    rows = rows.cast_column(column, datasets.Image(decode=False))
            return rows
        except Exception as error:  # whatever a file system, a network or a parser raises
            raise self._unreadable("", error) from None

    def _example(self, where: str, row: Mapping[str, Any]) -> Example:
        prompt = row.get(self.prompt_column)
        if not isinstance(prompt, str) or not prompt.strip():
            found = f"columns {', '.join(map(repr, row))}" if prompt is None else repr(prompt)[:60]
            raise PromptError(
                f"{where}: expected a prompt in {self.prompt_column!r}, found {found}; "
                "data.prompt_column of a training says which column holds it"
            )
        images = [self._image(where, row, column) for column in (self.image_column, self.last_image_column)]
        return Example(prompt.strip(), images[0], self._size(where, row) if self.sizes else None, images[1])

    def _image(self, where: str, row: Mapping[str, Any], column: str) -> Path | bytes | None:
        image = row.get(column)
        if isinstance(image, Mapping) and isinstance(image.get("bytes"), bytes):
            return image["bytes"]
        if isinstance(image, Mapping):
            image = image.get("path")
        if not image:
            return None
        if not isinstance(image, str):
            raise PromptError(f"{where}: expected an image file in {column!r}, found {image!r:.60}")
        location = Path(self.prompts)
        path = (location if location.is_dir() else location.parent) / image
        if not path.is_file():
            raise PromptError(f"{where}: there is no image {path}")
        return path

    def _size(self, where: str, row: Mapping[str, Any]) -> tuple[int, int, int | None] | None:
        texts = [row.get(name) for name in ("width", "height", "frames")]
        width, height, frames = (None if text in (None, "") else text for text in texts)
        if width is None and height is None and frames is None:
            return None
        try:
            size = int(str(width)), int(str(height)), None if frames is None else int(str(frames))
        except ValueError:
            size = 0, 0, None
        if min(size[0], size[1], size[2] or 1) < 1 or size[2] == 0:
            found = f"{width!r}, {height!r} and {frames!r}"
            raise PromptError(f"{where}: expected whole numbers in width and height, and in frames if any: {found}")
        return size


def _is_saved(path: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` wrote this folder."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line that is not empty and does not start with #."""
    with path.open("rb") as file:
        for number, line in enumerate(_bounded(path, file), 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise PromptError(
                    f"{path}, line {number}: not UTF-8 text ({error.reason}); save the file as UTF-8"
                ) from None
            if text and not text.startswith("#"):
                yield number, text


def _bounded(path: Path, file: IO[AnyStr]) -> Iterator[AnyStr]:
    """The lines of a file; one that is too long is not read any further."""
    for number in itertools.count(1):
        line = file.readline(LONGEST_LINE + 1)
        if not line:
            return
        if len(line) > LONGEST_LINE:
            raise PromptError(f"{path}, line {number}: longer than {LONGEST_LINE:,} characters; expected {FORMATS}")
        yield line


def _text_lines(path: Path, column: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in _lines(path):
        yield f"{path}, line {number}", {column: line}


def _json_lines(path: Path, column: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise PromptError(
                f'{path}, line {number}: expected one JSON object, like {{"prompt": "...", "image": "file"}}, '
                f"found {line[:60]}"
            )
        yield f"{path}, line {number}", row


def _json_list(path: Path, column: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a file that is one list of objects or of prompts; of one with an object a line, those."""
    with path.open("rb") as file:
        if not file.read(LONGEST_LINE).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _json_lines(path, column)
            return
    if (size := path.stat().st_size) > LONGEST_LIST:
        raise PromptError(
            f"{path}: a list of {size / 2**20:,.0f} MiB is not read as a whole: write one object a line, as .jsonl"
        )
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{path}: expected a JSON list in UTF-8: {' '.join(str(error).split())[:200]}") from None
    for number, row in enumerate(rows):
        if isinstance(row, str):
            row = {column: row}
        if not isinstance(row, dict):
            raise PromptError(f"{path}, entry {number}: expected a prompt or an object, found {row!r:.60}")
        yield f"{path}, entry {number}", row


def _table(path: Path, column: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a file of separated values with a header, which tells the separator.

    A column without a name, as pandas writes its index, is left out.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(_bounded(path, file), delimiter=_separator(path, column), restkey=_FURTHER, strict=True)
        try:
            for row in reader:
                if _FURTHER in row or None in row.values():
                    raise PromptError(
                        f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} values as in the "
                        "header; a prompt with commas or line breaks stands in double quotes"
                    )
                yield f"{path}, line {reader.line_num}", {name: value for name, value in row.items() if name}
        except (csv.Error, UnicodeDecodeError) as error:
            raise PromptError(f"{path}, after line {reader.line_num}: not CSV in UTF-8 ({error})") from None


def _separator(path: Path, column: str) -> str:
    """That of the file's suffix, or the other with which its header has the column."""
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = next(_bounded(path, file), "")
        names = {mark: next(csv.reader([header], delimiter=mark), []) for mark in (usual, ",", ";", "\t")}
    except (csv.Error, UnicodeDecodeError):  # which reading the rows says with its place
        return usual
    return next((mark for mark, found in names.items() if column in found), usual)


_READERS: dict[str, Callable[[Path, str], Iterator[tuple[str, Mapping[str, Any]]]]] = {
    "": _text_lines,
    ".txt": _text_lines,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _table,
    ".tsv": _table,
}
"""Suffix to what reads the rows of such a file, given the column of prompts."""


def read_examples(location: str | Path) -> list[Example]:
    """All examples of a short file, with the usual columns.

    Args:
        location: A file, a folder or a Hub id, as in ``ExampleSource``.

    Raises:
        PromptError: There is nothing, or it cannot be used.
    """
    return list(ExampleSource(str(location)))


def read_prompts(location: str | Path) -> list[str]:
    """The prompts of ``read_examples``."""
    return [example.prompt for example in read_examples(location)]
