"""Reading examples: every format, column choice, and one line that names the place of what is wrong."""

from __future__ import annotations

import builtins
import json
import tracemalloc
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pytest
from PIL import Image

from tests.helpers import hub as hub_module
from tests.helpers.hub import Hub
from tests.helpers.hub_client import Client
from training.config.sections import DataSection
from training.data.examples import Example, ExampleSource, PromptError, read_examples, read_prompts

ROWS = [{"prompt": "a fox", "id": 1}, {"prompt": 'a "red"\npanda, asleep', "id": 2}, {"prompt": "鮭 on ice", "id": 3}]


def refused(source: ExampleSource) -> str:
    """The one line with which reading ends."""
    with pytest.raises(PromptError) as error:
        list(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> str:
    """The rows in a file or folder of this kind."""
    data, path = datasets.Dataset.from_list(rows), folder / f"data.{kind}"
    if kind in ("csv", "tsv"):
        data.to_csv(path, index=False, sep="," if kind == "csv" else "\t")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "parquet":
        data.to_parquet(path)
    elif kind == "saved":
        data.save_to_disk(str(path))
    else:
        path.mkdir()
        data.to_parquet(path / "train-00000-of-00001.parquet")
    return str(path)


KINDS = ["csv", "tsv", "jsonl", "parquet", "saved", "folder"]


def test_a_text_file_is_a_prompt_a_line_without_blanks_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbf# head\r\n a fox \r\n\r\n\xe9\xae\xad on ice\n")
    assert read_prompts(path) == ["a fox", "鮭 on ice"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_examples(kind: str, tmp_path: Path) -> None:
    location = write(tmp_path, kind, ROWS)
    assert list(ExampleSource(location)) == [Example(row["prompt"]) for row in ROWS]
    assert list(ExampleSource(location, limit=2)) == [Example(row["prompt"]) for row in ROWS[:2]]
    (tmp_path / "renamed").mkdir()
    renamed = write(tmp_path / "renamed", kind, [{"caption": row["prompt"], "prompt": "wrong"} for row in ROWS])
    assert [e.prompt for e in ExampleSource(renamed, prompt_column="caption")] == [row["prompt"] for row in ROWS]


_AT = f"/api/datasets/{hub_module._REPO}"
DATASETS = [
    ("GET", _AT, "info"),
    ("GET", f"{_AT}/revision/{hub_module._REVISION}", "info"),
    ("GET", f"{_AT}/tree/{hub_module._REVISION}(/.*)?", "tree"),
    ("GET HEAD", f"/datasets/{hub_module._REPO}/resolve/{hub_module._REVISION}/(?P<path>.+)", "resolve"),
]
"""How the Hub names what it does for models too when it does it for datasets."""


def test_a_dataset_of_the_hub_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "ROUTES", [*hub_module.ROUTES, *DATASETS])
    lines = "".join(json.dumps({"caption": row["prompt"]}) + "\n" for row in ROWS)
    with Hub() as hub, Client(hub.url, tmp_path) as client:
        hub.put("user/prompts.v2", {"train.jsonl": lines.encode(), "test.jsonl": b'{"caption": "other"}\n'})
        read = "from training.data.examples import ExampleSource; result = [e.prompt for e in ExampleSource({})]"
        found = client.run(read.format("'user/prompts.v2', 'caption'"))
        assert found.error is None and found.result == [row["prompt"] for row in ROWS]
        assert client.run(read.format("'user/prompts.v2', 'caption', split='test'")).result == ["other"]
        refused = client.run(read.format("'user/nothing'"))
        assert refused.kind == "PromptError" and "user/nothing" in str(refused.error)
        assert "\n" not in str(refused.error)
    assert not list(tmp_path.rglob("*.jsonl")), "nothing is kept of what is streamed"


def test_a_file_that_is_not_there_is_not_sought_on_the_hub() -> None:
    for location in ("prompts/missing.txt", "prompts/missing.jsonl", "missing", "a/b/c", "-x/y"):
        with mock.patch("datasets.load_dataset", side_effect=AssertionError("asked the Hub")):
            assert f"{location}: no such prompt file" in refused(ExampleSource(location))


@pytest.mark.parametrize("kind", KINDS)
def test_a_subset_and_a_revision_are_of_data_that_has_them(kind: str, tmp_path: Path) -> None:
    location = write(tmp_path, kind, ROWS)
    assert "data.revision is for a dataset on the Hub" in refused(ExampleSource(location, revision="main"))
    if kind != "folder":
        assert "data.subset is for a dataset of several" in refused(ExampleSource(location, subset="english"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_that_is_not_there_is_named_with_those_that_are(kind: str, tmp_path: Path) -> None:
    said = refused(ExampleSource(write(tmp_path, kind, ROWS), prompt_column="caption"))
    assert "'caption'" in said and "'prompt', 'id'" in said and "data.prompt_column" in said


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_empty_prompt_is_refused_where_it_is(kind: str, tmp_path: Path) -> None:
    said = refused(ExampleSource(write(tmp_path, kind, [*ROWS, {"prompt": " ", "id": 4}])))
    assert ("line 4" if kind == "jsonl" else "row 3") in said and "expected a prompt" in said


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_read_only_when_they_are_wanted(kind: str, tmp_path: Path) -> None:
    location = write(tmp_path, kind, [{"prompt": "a fox", "width": 832, "height": 480, "frames": 81}])
    assert [example.size for example in ExampleSource(location)] == [None]
    assert [example.size for example in DataSection(location, buckets="columns")] == [(832, 480, 81)]


@pytest.mark.parametrize("size", [{"width": 832}, {"width": -1, "height": 8}, {"width": "wide", "height": 8}])
def test_a_size_that_is_none_is_refused(size: dict[str, Any], tmp_path: Path) -> None:
    location = write(tmp_path, "jsonl", [{"prompt": "a fox"}, {"prompt": "a panda", **size}])
    assert "line 2: expected whole numbers" in refused(DataSection(location, buckets="columns"))
    assert len(list(ExampleSource(location))) == 2


def test_images_lie_beside_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "fox.png").write_bytes(b"")
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a fox", "image": "fox.png"}\n\n{"prompt": "a panda"}\n', encoding="utf-8")
    assert read_examples(path) == [Example("a fox", tmp_path / "fox.png"), Example("a panda")]
    path.write_text('{"prompt": "a fox", "image": "fox.png", "last_image": "fox.png"}\n', encoding="utf-8")
    fox = tmp_path / "fox.png"
    assert read_examples(path) == [Example("a fox", fox, last_image=fox)]
    path.write_text('{"prompt": "a fox", "picture": "fox.png"}\n', encoding="utf-8")
    assert list(ExampleSource(str(path), image_column="picture")) == [Example("a fox", tmp_path / "fox.png")]


def test_images_inside_a_parquet_file_are_read_as_they_are(tmp_path: Path) -> None:
    stream = BytesIO()
    Image.new("RGB", (8, 4), "red").save(stream, "png")
    rows = {"prompt": ["a fox"], "image": [{"bytes": stream.getvalue(), "path": None}]}
    features = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "p.parquet")
    assert list(ExampleSource(str(tmp_path / "p.parquet"))) == [Example("a fox", stream.getvalue())]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", None, "no such prompt file"),
        ("p.txt", b"# only\n\n", "no prompts in it"),
        ("p.txt", b"fine\na\xff\n", "line 2: not UTF-8"),
        ("p.csv", b"prompt,id\nfine,1\na\xff,2\n", "not CSV in UTF-8"),
        ("p.csv", b"prompt,id\nfine,1\na fox, asleep,2\n", "line 3: expected 2 values"),
        ("p.csv", b'prompt,id\nfine,1\n"open,2\n', "not CSV in UTF-8"),
        ("p.jsonl", b'{"prompt": "fine"}\na fox\n', "line 2: expected one JSON object"),
        ("p.jsonl", b'{"prompt": "fine"}\n["a fox"]\n', "line 2: expected one JSON object"),
        ("p.jsonl", b'{"prompt": "fine"}\n{"prompt": 3}\n', "line 2: expected a prompt"),
        ("p.jsonl", b'{"prompt": "fine"}\n{"prompt": "a", "image": 3}\n', "line 2: expected an image file"),
        ("p.jsonl", b'{"prompt": "fine"}\n{"prompt": "a", "image": "none.png"}\n', "line 2: there is no image"),
        ("p.parquet", b"nothing of the kind", "cannot be read as a dataset"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_its_place(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    said = refused(ExampleSource(str(tmp_path / name)))
    assert words in said and str(tmp_path / name) in said


def test_an_empty_folder_is_one_line(tmp_path: Path) -> None:
    assert "cannot be read as a dataset" in refused(ExampleSource(str(tmp_path)))


def test_without_the_library_the_line_says_what_to_install(tmp_path: Path) -> None:
    location = write(tmp_path, "parquet", ROWS)
    real = builtins.__import__

    def without_datasets(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest)

    with mock.patch("builtins.__import__", without_datasets):
        assert "pip install 'phased-dmd[data]'" in refused(ExampleSource(location))


def test_a_long_file_is_never_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    line = json.dumps({"prompt": "a fox " * 50}) + "\n"
    path.write_text(line * 50_000, encoding="utf-8")
    tracemalloc.start()
    count = sum(1 for _ in ExampleSource(str(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 50_000 and peak < path.stat().st_size / 10


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.json", '["a fox", "a red, panda"]'),
        ("p.json", '[{"prompt": "a fox"}, {"prompt": "a red, panda"}]'),
        ("p.json", '\n{"prompt": "a fox"}\n{"prompt": "a red, panda"}\n'),
        ("p.ndjson", '{"prompt": "a fox"}\n{"prompt": "a red, panda"}\n'),
        ("P.JSONL", '{"prompt": "a fox"}\n{"prompt": "a red, panda"}\n'),
        ("P.CSV", 'prompt\na fox\n"a red, panda"\n'),
        ("P.TXT", "a fox\na red, panda\n"),
        ("prompts", "a fox\na red, panda\n"),
        ("p.csv", "id;prompt\n1;a fox\n2;a red, panda\n"),
        ("p.csv", "id\tprompt\n1\ta fox\n2\ta red, panda\n"),
        ("p.csv", ',prompt\n0,a fox\n1,"a red, panda"\n'),
        ("p.tsv", '"id","prompt"\n1,a fox\n2,"a red, panda"\n'),
    ],
)
def test_what_programs_write_is_read(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_prompts(tmp_path / name) == ["a fox", "a red, panda"]


def test_a_file_of_another_kind_is_refused_instead_of_read_as_text(tmp_path: Path) -> None:
    for name in ("p.yaml", "p.docx", "p.txt.gz"):
        (tmp_path / name).write_text("a fox\n", encoding="utf-8")
        assert f"found a file that ends in '.{name.rpartition('.')[2]}'" in refused(ExampleSource(str(tmp_path / name)))
    for content, words in (("[1]", "entry 0: expected a prompt"), ('["a', "expected a JSON list")):
        (tmp_path / "p.json").write_text(content, encoding="utf-8")
        assert words in refused(ExampleSource(str(tmp_path / "p.json")))
    with mock.patch("training.data.examples.LONGEST_LIST", 2):
        assert "write one object a line, as .jsonl" in refused(ExampleSource(str(tmp_path / "p.json")))
