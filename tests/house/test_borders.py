"""Private names of other libraries stand in docs/borders.md with a reason, and no other name stands there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.helpers.source import ROOT, Module, modules

PRIVATE = re.compile(r"_[A-Za-z]\w*")
BY_NAME = {"getattr", "hasattr", "setattr", "delattr"}
LOOKUPS = {"get", "pop", "setdefault"}


def listed() -> dict[str, str]:
    """Name to reason, as the page has them."""
    page = (ROOT / "docs" / "borders.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| \w+ \| (.+) \|$", page, re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a name stands there once"
    return dict(rows)


def defined_by(tree: ast.AST) -> set[str]:
    """Private names that a file itself gives to functions, classes, variables, fields and attributes."""
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
    return {name for name in names if PRIVATE.fullmatch(name)}


def used(tree: ast.AST, inherited: set[str]) -> Iterator[tuple[int, str]]:
    """Lines and private names that are none of ours: attributes, imports, strings that look one up.

    ``inherited``: names that some file of ours defines, which ``self`` may have from there.
    """
    own = defined_by(tree)
    for node in ast.walk(tree):
        names: list[object] = []
        match node:
            case ast.Attribute(attr=name, value=value):
                of_ourselves = ast.unparse(value) in {"self", "cls", "super()"}
                names = [] if name in (inherited if of_ourselves else own) else [name]
            case ast.ImportFrom(level=0, module=module):
                names = [*(module or "").split("."), *(alias.name for alias in node.names)]
            case ast.Import():
                names = [part for alias in node.names for part in alias.name.split(".")]
            case ast.Call(func=ast.Name(id=function), args=[_, ast.Constant(value=name), *_]) if function in BY_NAME:
                names = [name]
            case ast.Call(func=ast.Attribute(attr=method), args=[ast.Constant(value=name), *_]) if method in LOOKUPS:
                names = [name]
            case ast.Subscript(slice=ast.Constant(value=name)):
                names = [name]
            case ast.Dict(keys=keys):
                names = [key.value for key in keys if isinstance(key, ast.Constant)]
            case ast.Compare(left=ast.Constant(value=name), ops=[ast.In() | ast.NotIn()]):
                names = [name]
        for name in names:
            if isinstance(name, str) and PRIVATE.fullmatch(name) and name not in own:
                yield node.lineno, name


def uses() -> dict[str, list[str]]:
    """Private name to the places that use it."""
    known: dict[str, Module] = modules()
    inherited = set().union(*(defined_by(module.tree) for module in known.values()))
    found: dict[str, list[str]] = {}
    for module in known.values():
        for line, name in used(module.tree, inherited):
            found.setdefault(name, []).append(f"{module.path.relative_to(ROOT)}:{line}")
    return found


def test_the_private_names_of_other_libraries_are_those_of_the_page() -> None:
    page, code = listed(), uses()
    assert len(code) > 10
    assert not {name: places for name, places in code.items() if name not in page}, (
        "without a reason in docs/borders.md"
    )
    assert not set(page) - set(code), "in docs/borders.md but not used"
    assert all(len(reason) > 20 for reason in page.values())


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch._dynamo.reset()",
        "from torch._dynamo import config",
        "from torch import _dynamo",
        "import torch._dynamo",
        "layer._dynamo = 1",
        "self._dynamo",
        "getattr(layer, '_dynamo', None)",
        "vars(layer)['_dynamo']",
        "layer.__dict__.pop('_dynamo', None)",
        "layer.__dict__ |= {'_dynamo': None}",
        "'_dynamo' in layer.__dict__",
    ],
)
def test_every_way_to_a_private_name_is_seen(code: str) -> None:
    assert {name for _, name in used(ast.parse(code), set())} == {"_dynamo"}


@pytest.mark.parametrize(
    "code",
    [
        "def _ours(): ...\nmodule._ours()",
        "class A:\n    _ours = 1\n\nA._ours",
        "class A:\n    def __init__(self):\n        self._ours = 1\n\nA()._ours",
        "self._inherited",
        "super()._inherited()",
        "value.__dict__",
        "for _ in range(3): print(_)",
        "name.removesuffix('_seconds')",
    ],
)
def test_names_of_our_own_are_not(code: str) -> None:
    assert not list(used(ast.parse(code), {"_inherited"}))
