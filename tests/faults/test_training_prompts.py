"""A file of prompts that is not what it should be takes neither memory nor time."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from training.data.examples import LONGEST_LINE, ExampleSource, PromptError


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl", "prompts.csv", "prompts.tsv"])
def test_a_line_without_end_is_refused_before_it_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(b"prompt\n" if path.suffix in (".csv", ".tsv") else b'{"prompt": "a panda"}\n')
        file.truncate(2**36)  # 64 GiB that no disk has to hold
    tracemalloc.start()
    try:
        with pytest.raises(PromptError, match=r"line 2: longer than 1,048,576 characters; expected ") as error:
            list(ExampleSource(str(path)))
        assert tracemalloc.get_traced_memory()[1] < 8 * LONGEST_LINE
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value) and str(path) in str(error.value)
