"""What nodes say in Chinese."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHINESE: dict[str, str] = json.loads((ROOT / "locales/zh/sentences.json").read_text(encoding="utf-8"))
ERRORS = {"NodeError", "PhasePlanError", "ExpertsError"}
FILES = [
    *(ROOT / "comfy_nodes").glob("*.py"),
    *(ROOT / "pdmd_core" / f"{name}.py" for name in ("phases", "boundary_plan", "sampling", "experts/hub/download")),
    *(ROOT / "pdmd_core/experts/format").glob("*.py"),
    *(ROOT / "pdmd_core/experts/lora").glob("*.py"),
]
NOT_OF_NODES = (
    "the phases of a plan are a tuple",
    "the sigmas of a Phase are a tuple",
    "phase index",
    "sigma to route",
    "sigmas are given as",
    "the phases of a plan are a list",
    "the sigmas of a phase are a list",
    "sigmas are numbers in (0, 1], found {}",
    "a phase plan is JSON",
    "{} is an object with exactly",
)
"""Of callers of the library, who write Python."""


def template(node: ast.expr) -> str | None:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in values)
    return None


def sentences() -> Iterator[tuple[str, str]]:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS and node.args:
                text = template(node.args[0])
                if text and any(letter.isalpha() for letter in text):
                    yield file.name, text.removeprefix("{}: ")


def test_every_error_that_a_node_can_give_has_its_sentence() -> None:
    found = [(file, text) for file, text in sentences() if text not in CHINESE and not text.startswith(NOT_OF_NODES)]
    assert found == []
    assert sum(1 for _ in sentences()) > 90


def test_a_translation_has_the_places_of_its_sentence() -> None:
    for english, chinese in CHINESE.items():
        places = [f"<{k}>" for k in range(english.count("{}"))]
        filled = chinese.format(*places)
        assert all(filled.count(place) <= 1 for place in places) and "{" not in filled, english
        assert any("\u4e00" <= letter <= "\u9fff" for letter in chinese), english


def test_what_is_filled_in_is_kept_and_translated_where_it_is_a_sentence(part) -> None:
    language = part("language")
    with language.speaking("zh-CN", ""):
        said = language.said("8 steps, trained for 4: set steps to 0")
        assert said == CHINESE["{} steps, trained for {}: set steps to 0"].format(8, 4)
        said = language.said("x: no key of this LoRA belongs to a WAN21, they look like; these experts belong to b (C)")
        first, last = CHINESE["no key of this LoRA belongs to a {}{}"], CHINESE["{}; these experts belong to {} ({})"]
        assert said == last.format(f"x: {first.format('WAN21', ', they look like')}", "b", "C")
        lines = language.said("Warning: no step runs expert a\nof nobody").split("\n")
        assert lines == [CHINESE["Warning: {}"].format(CHINESE["no step runs expert {}"].format("a")), "of nobody"]
    assert language.said("connect a plan") == "connect a plan"


def test_a_prompt_speaks_as_the_front_end_that_queued_it(part, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    language = part("language")
    with language.speaking("zh", "one"), language.speaking("en", "two"):
        pass
    instance = SimpleNamespace(client_id="one")
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    assert language.said("connect a plan") == CHINESE["connect a plan"]
    for client in ("two", "nobody"):
        instance.client_id = client
        assert language.said("connect a plan") == "connect a plan"


@pytest.mark.parametrize("locale", ["fr", "../zh", "", "zh/..", "de-DE"])
def test_an_unknown_language_is_english(part, locale: str) -> None:
    with part("language").speaking(locale, ""):
        assert part("language").said("connect a plan") == "connect a plan"


def test_errors_are_worded_in_the_language_with_their_file_last(part) -> None:
    worded = part("errors").worded
    with part("language").speaking("zh", ""):
        found = worded("/models/loras/x.safetensors: no such file")
    assert found == CHINESE["no such file"] + " (x.safetensors)"
    assert worded("a.safetensors of experts: no such file") == "no such file (a.safetensors of experts)"


def test_every_sentence_of_the_converter_has_its_translation() -> None:
    used = re.findall(r'(?:NotConverted\(|said\(app, )"([^"]+)"', (ROOT / "web/convert.js").read_text(encoding="utf-8"))
    known = re.findall(r'^  "(.+)":$', (ROOT / "web/convert_words.js").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(used) == set(known) and len(known) > 10
