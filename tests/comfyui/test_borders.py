"""The parts of ComfyUI that docs/borders.md names are there, with the arguments that the nodes give them."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import pytest

from tests.helpers.comfyui.server import REPOSITORY

PAGE = (REPOSITORY / "docs/borders.md").read_text(encoding="utf-8")
PARTS = re.findall(r"^\| `([\w.]+\.\w+)(?:\(([\w, ]+)\))?` \| .+ \|$", PAGE, re.MULTILINE)


def found(name: str, patcher: Any) -> Any:
    """A name of a module, class or, of a MODEL, of its objects."""
    module, rest = name, []
    while True:
        try:
            value = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
    for part in rest:
        value = patcher if part == "ModelPatcher" else getattr(value, part)
    return value


@pytest.mark.parametrize(("name", "arguments"), PARTS, ids=[name for name, _ in PARTS])
def test_the_part_is_there(pack, models, name: str, arguments: str) -> None:
    value = found(name, models.wan())
    if arguments:
        known = inspect.signature(value).parameters
        assert set(arguments.split(", ")) <= set(known), f"{name} takes {', '.join(known)}"


def test_the_page_names_the_modules_of_comfyui_that_the_nodes_import() -> None:
    """A module that is not there is used through its nodes or loaders, which users see."""
    imported = set()
    for path in (REPOSITORY / "comfy_nodes").glob("*.py"):
        imported |= set(re.findall(r"^(?:import|from) (comfy\.\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    named = {name.rpartition(".")[0].split(".ModelPatcher")[0] for name, _ in PARTS}
    loaders = {"comfy.sd1_clip", "comfy.supported_models_base", "comfy.text_encoders", "comfy.model_management"}
    assert imported - loaders <= {".".join(name.split(".")[:2]) for name in named}
    assert len(PARTS) > 25
