"""The Python files of this repository as syntax trees: which modules there are, and what each imports from which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pdmd_core", "training", "comfy_nodes", "benchmarks")


@dataclass(frozen=True)
class Module:
    """A file with its dotted name."""

    name: str
    path: Path

    @property
    def tree(self) -> ast.Module:
        return parsed(self.path)

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"


@dataclass(frozen=True)
class Import:
    """One name that a module takes from another module of this repository."""

    source: Module
    target: Module
    name: str | None
    """None where the module itself is imported."""
    line: int

    def __str__(self) -> str:
        what = f"{self.name} from {self.target.name}" if self.name else self.target.name
        return f"{self.source.path.relative_to(ROOT)}:{self.line} imports {what}"


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def modules(*packages: str) -> dict[str, Module]:
    """Dotted name to module, of these packages; of all four when none is named."""
    found = {}
    for package in packages or PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = Module(name, path)
    return found


def imports(module: Module, known: dict[str, Module]) -> Iterator[Import]:
    """What a module imports from the known ones, anywhere in it but under ``if TYPE_CHECKING``."""
    for node in without_type_checking(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in known:
                    yield Import(module, known[alias.name], None, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = origin(module, node)
            for alias in node.names:
                if f"{base}.{alias.name}" in known:
                    yield Import(module, known[f"{base}.{alias.name}"], None, node.lineno)
                elif base in known:
                    yield Import(module, known[base], alias.name, node.lineno)


def origin(module: Module, node: ast.ImportFrom) -> str:
    """The dotted name after ``from``, with the dots of a relative import resolved."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    parts = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def without_type_checking(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield other
                yield from without_type_checking(other)
            continue
        yield node
        yield from without_type_checking(node)


def definitions(tree: ast.Module) -> set[str]:
    """Names that a file defines at its top (also under ``if`` and ``try``), imports left out."""
    names: set[str] = set()
    todo: list[ast.stmt] = list(tree.body)
    while todo:
        node = todo.pop()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Assign():
                names |= {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.If() | ast.With():
                todo += [*node.body, *getattr(node, "orelse", [])]
            case ast.Try():
                todo += [*node.body, *node.orelse, *node.finalbody, *(s for h in node.handlers for s in h.body)]
    return names
