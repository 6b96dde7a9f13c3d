from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from pdmd_core.experts import ExpertsError
from pdmd_core.experts.format import header as header_module
from pdmd_core.experts.format.header import DTYPES, MAX_HEADER_BYTES, TensorSpec, read_header
from pdmd_core.experts.format.weights import open_weights
from tests.helpers.manifests import one_line

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: object, data: int = 24, length: int | None = None) -> Path:
    """A file of this header (text as it is, anything else as JSON) and so many zero bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ExpertsError) as caught:
        read_header(path)
    text = one_line(caught.value)
    assert text.startswith(f"{path}: ")
    return text


def test_a_header_says_what_the_library_says(tmp_path: Path) -> None:
    tensors = {name: torch.ones(3, 2).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "h ünï": torch.zeros(1)}
    safetensors.torch.save_file(tensors, tmp_path / "x", metadata={"key": 'text with "quotes" and\nü'})
    header = read_header(tmp_path / "x")
    with safe_open(tmp_path / "x", "pt") as file:
        assert header.metadata == file.metadata()
    assert header.specs == {name: TensorSpec(value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    weights = open_weights(tmp_path / "x")
    assert all(torch.equal(weights.read(name), value) for name, value in tensors.items())


def test_a_file_of_no_tensors_is_a_file(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "x", {}, 0)).specs == {}
    assert read_header(write(tmp_path / "x", {"__metadata__": {"a": "b"}}, 0)).metadata == {"a": "b"}


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("x", "tensor 'w' has dtype, shape and data_offsets, found 'x'"),
        ({"dtype": "F32"}, "tensor 'w' has dtype, shape and data_offsets, found {'dtype': 'F32'}"),
        (ENTRY | {"extra": 1}, "tensor 'w' has dtype, shape and data_offsets, found"),
        (ENTRY | {"dtype": "F99"}, "tensor 'w' is of one of F64, F32, F16"),
        (ENTRY | {"dtype": ["F32"]}, "found ['F32']"),
        (ENTRY | {"shape": 6}, "tensor 'w' has a shape of at most 8 whole numbers, found 6"),
        (ENTRY | {"shape": [6.0]}, "whole numbers, found [6.0]"),
        (ENTRY | {"shape": [True, 6]}, "whole numbers, found [True, 6]"),
        (ENTRY | {"shape": [-2, -3]}, "whole numbers, found [-2, -3]"),
        (ENTRY | {"shape": [1] * 7 + [2, 3]}, "a shape of at most 8 whole numbers"),
        (ENTRY | {"shape": [2, 4]}, "tensor 'w' of shape [2, 4] in F32 does not fill its data_offsets [0, 24]"),
        (ENTRY | {"shape": [10**400]}, "in F32 does not fill its data_offsets"),
        (ENTRY | {"shape": [2**32, 2**32, 0], "data_offsets": [0, 0]}, "does not fill its data_offsets [0, 0]"),
        (ENTRY | {"data_offsets": [0]}, "tensor 'w' has two whole numbers as data_offsets, found [0]"),
        (ENTRY | {"data_offsets": [24, 0]}, "does not fill its data_offsets [24, 0]"),
        (ENTRY | {"data_offsets": [-24, 0]}, "two whole numbers as data_offsets, found [-24, 0]"),
        (ENTRY | {"data_offsets": ["0", "24"]}, "two whole numbers as data_offsets"),
        (ENTRY | {"data_offsets": [4, 28]}, "tensor 'w' starts at byte 0 of the data, found 4"),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_an_entry_that_is_wrong_is_named(tmp_path: Path, entry: object, expected: str) -> None:
    text = refusal(write(tmp_path / "x", {"w": entry}))
    assert "not a readable safetensors file" in text and expected in text


@pytest.mark.parametrize(
    ("header", "data", "expected"),
    [
        ({"a": ENTRY, "b": ENTRY}, 24, "tensor 'b' starts at byte 24 of the data, found 0"),
        (
            {"a": ENTRY, "b": ENTRY | {"data_offsets": [28, 52]}},
            52,
            "tensor 'b' starts at byte 24 of the data, found 28",
        ),
        ({"w": ENTRY}, 23, "it was cut off or extended"),
        ({"w": ENTRY}, 25, "it was cut off or extended"),
        ({}, 1, "it was cut off or extended"),
        ({"a\nb": ENTRY}, 24, r"printable characters, found 'a\nb'"),
        ({"a\x1b[2J": ENTRY}, 24, r"printable characters, found 'a\x1b[2J'"),
        ({"a" * 501: ENTRY}, 24, "at most 500 printable characters, found 'aaa"),
        ({"__metadata__": []}, 0, "__metadata__ is an object of texts"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__ is an object of texts"),
        ([], 0, "the header is a JSON object, found b'[]'"),
        (b" {}", 0, "the header is a JSON object, found b' {}'"),
        (b"{} {}", 0, "the header is not JSON: Extra data"),
        (b'{"a', 0, "the header is not JSON: "),
        (b'{"\xff": 1}', 0, "the header is not JSON: not UTF-8 text"),
        (b'{"__metadata__": {"\\ud800": ""}}', 0, "half of a surrogate pair is no character"),
        (b'{"a": NaN}', 0, "the header is not JSON: NaN is no number"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", 0, "more than 32 objects and lists in each other"),
        (b'{"a": ' + b"[" * 100_000, 0, "the header is not JSON: more than 32"),
        (b'{"a": ' + b"1" * 5000 + b"}", 0, "the header is not JSON: "),
        (b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{}}', 1, "the key 'a' is there twice"),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_a_header_that_is_wrong_as_a_whole_is_one_line(
    tmp_path: Path, header: object, data: int, expected: str
) -> None:
    assert expected in refusal(write(tmp_path / "x", header, data))


@pytest.mark.parametrize("length", [0, 1, 3, 2**31, 2**63, 2**64 - 1])
def test_a_length_beyond_the_file_is_refused_before_memory_is_taken(tmp_path: Path, length: int) -> None:
    assert f"the header is 2 to {MAX_HEADER_BYTES} bytes within the file, found {length} in 10 bytes" in refusal(
        write(tmp_path / "x", b"{}", 0, length)
    )


def test_a_header_and_its_tensors_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(2 * MAX_HEADER_BYTES)  # takes no room on the disk
    assert f"found {MAX_HEADER_BYTES + 1} in" in refusal(tmp_path / "large")
    monkeypatch.setattr(header_module, "MAX_TENSORS", 2)
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    assert len(read_header(write(tmp_path / "x", {"a": empty, "b": empty}, 0)).specs) == 2
    assert "at most 2 tensors, found 3" in refusal(write(tmp_path / "x", {"a": empty, "b": empty, "c": empty}, 0))


def test_what_is_no_file_is_one_line(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "nothing")
    assert "found something else" in refusal(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    assert "no such file" in refusal(tmp_path / "circle")


def test_shards_that_hold_the_same_weight_are_refused(tmp_path: Path) -> None:
    files = [write(tmp_path / name, {"w": ENTRY}) for name in ("a", "b")]
    with pytest.raises(ExpertsError, match="w is in another of these files as well"):
        open_weights(*files)


def test_the_library_takes_every_header_that_is_taken_here(tmp_path: Path) -> None:
    """And some that are refused here, which are none that it writes."""
    good: list[Any] = [{"w": ENTRY}, {"w": ENTRY, "__metadata__": {}}, {"w": ENTRY | {"shape": [6]}}]
    for header in good:
        path = write(tmp_path / "x", header)
        assert read_header(path).specs["w"].shape == safetensors.torch.load_file(path)["w"].shape
    for header in ([], {"w": ENTRY | {"shape": [7]}}, {"w": ENTRY | {"dtype": "F99"}}):
        refusal(write(tmp_path / "x", header))
        with pytest.raises(SafetensorError):
            safetensors.torch.load_file(tmp_path / "x")
