"""Which file imports which: no cycle, no arrow upward, and each name from the file that defines it."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Set
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

import pytest

from tests.helpers.source import PACKAGES, ROOT, Import, definitions, imports, modules

FLOORS = {
    "pdmd_core": {"pdmd_core"},
    "comfy_nodes": {"comfy_nodes", "pdmd_core"},
    "training": {"training", "pdmd_core"},
    "benchmarks": {"benchmarks", "training", "pdmd_core", "tests"},
}
"""Package to the packages that it may import from."""
PUBLIC = {
    "pdmd_core",
    "pdmd_core.experts",
    "pdmd_core.experts.hub",
    "pdmd_core.families",
    "pdmd_core.metrics",
    "pdmd_core.pipelines",
}
"""Packages that offer, as what users import, names that their files define."""


def all_imports() -> list[Import]:
    """Of the four packages and the tests, from each other."""
    known = modules(*PACKAGES, "tests")
    return [found for module in known.values() for found in imports(module, known)]


def cycle(graph: Mapping[str, Set[str]]) -> list[str]:
    """A way from a node back to itself; empty when there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))  # it lists each node after one that leads to it
    return []


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Neither at the top nor within functions; ``if TYPE_CHECKING`` is for the type checker alone."""
    graph: dict[str, set[str]] = {}
    for found in all_imports():
        graph.setdefault(found.source.name, set()).add(found.target.name)
    assert sum(map(len, graph.values())) > 500
    assert not (way := cycle(graph)), " -> ".join(way)


@pytest.mark.parametrize(
    ("graph", "way"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, set()),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, {"b", "c"}),
        ({"a": {"a"}}, {"a"}),
    ],
)
def test_a_cycle_is_found(graph: dict[str, set[str]], way: set[str]) -> None:
    found = cycle(graph)
    assert set(found) == way
    assert all(after in graph[before] for before, after in pairwise(found))


def test_packages_import_downwards_only() -> None:
    known = {*PACKAGES, "tests"}
    upward = []
    for found in all_imports():
        source, target = (module.name.partition(".")[0] for module in (found.source, found.target))
        if source in FLOORS and target not in FLOORS[source]:
            upward.append(str(found))
    assert not upward
    for module in modules().values():  # names that are no module of ours, such as a folder
        for node in ast.walk(module.tree):
            roots = [alias.name.partition(".")[0] for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                roots = [(node.module or "").partition(".")[0]]
            package = module.name.partition(".")[0]
            assert not (set(roots) & known) - FLOORS[package], f"{module.path.relative_to(ROOT)}:{node.lineno}"


def test_each_name_is_imported_from_where_it_is_defined() -> None:
    """Or from a package that offers it to users; and it exists, also where an import runs late."""
    wrong = []
    for found in all_imports():
        if found.name is None or found.name in definitions(found.target.tree):
            continue
        if not (found.target.name in PUBLIC and found.name in offered(found.target.tree)):
            wrong.append(str(found))
    assert not wrong


def offered(tree: ast.Module) -> set[str]:
    """The names in ``__all__``."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def test_no_file_only_passes_names_on() -> None:
    passing = []
    for name, module in modules(*PACKAGES, "tests").items():
        imported = any(isinstance(node, ast.Import | ast.ImportFrom) for node in module.tree.body)
        if name not in PUBLIC and imported and not definitions(module.tree) and not runs(module.tree):
            passing.append(name)
        if module.is_package and name not in PUBLIC and imported:
            passing.append(f"{name} is no public package, but its __init__.py imports")
    assert not passing
    for name in PUBLIC - {"pdmd_core"}:
        assert offered(modules()[name].tree), f"{name} offers nothing in __all__"


def runs(tree: ast.Module) -> bool:
    """Whether a file does something of its own at the top, such as a script does."""
    return any(isinstance(node, ast.If | ast.With | ast.For | ast.Expr) for node in tree.body[1:])
