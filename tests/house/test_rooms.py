"""Folders say their concern: what lies where, how long files are, and that each has its test."""

from __future__ import annotations

import ast
import statistics
import tomllib
from collections import defaultdict
from pathlib import Path

from tests.helpers.source import PACKAGES, ROOT, Module, imports, modules, origin

COMMANDS = {"distill.py", "evaluate.py", "sample.py"}
CONCERNS = {"config", "data", "distributed", "embedded", "evaluation", "loop", "memory", "monitoring"}
DATA = {"architectures", "configs", "prompts"}
LONGEST, MEDIAN = 400, 113
"""Lines of a Python file."""
OWN_ROOMS = {"comfyui", "docs", "end_to_end", "faults", "helpers", "house"}
"""Folders of tests that are about more than one file: in ComfyUI, in documents, of the whole, of faults."""


def folders(path: Path) -> set[str]:
    return {child.name for child in path.iterdir() if child.is_dir() and child.name != "__pycache__"}


def lengths() -> dict[str, int]:
    """Lines of each Python file of the repository."""
    found = [path for part in (*PACKAGES, "tests", ".ci", "docs") for path in (ROOT / part).rglob("*.py")]
    return {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in found}


def test_training_has_the_commands_at_its_top_and_a_folder_for_each_concern() -> None:
    assert {path.name for path in (ROOT / "training").glob("*.py")} == COMMANDS | {"__init__.py"}
    assert folders(ROOT / "training") == CONCERNS | DATA
    for name in DATA:
        assert not list((ROOT / "training" / name).rglob("*.py")), f"training/{name} holds data"


def test_a_file_fits_into_a_head() -> None:
    found = lengths()
    assert len(found) > 300
    assert not {name: lines for name, lines in found.items() if lines >= LONGEST}
    assert statistics.median(found.values()) <= MEDIAN


def test_folders_of_tests_are_those_of_the_packages() -> None:
    assert folders(ROOT / "tests") <= OWN_ROOMS | set(PACKAGES)
    for package in PACKAGES:
        for path in (ROOT / "tests" / package).rglob("*"):
            if path.is_dir() and path.name != "__pycache__":
                place = ROOT / path.relative_to(ROOT / "tests")
                assert place.is_dir() or place.with_suffix(".py").is_file(), f"{path} mirrors nothing"


def test_each_file_has_its_test() -> None:
    """A test of its name in the folder of its package's tests, or one there that imports it, or a reason why not."""
    listed = tomllib.loads((ROOT / "tests/house/tested_elsewhere.toml").read_text(encoding="utf-8"))
    elsewhere = {place: test for places in listed.values() for place, test in places.items()}
    untested, needed = untested_files(), set()
    missing = []
    for path in untested:
        reasons = {place for place in elsewhere if path == place or (place.endswith("/") and path.startswith(place))}
        needed |= reasons
        missing += [] if reasons else [path]
    assert not missing, "neither with a test in its place nor in tests/house/tested_elsewhere.toml"
    assert set(elsewhere) == needed, "stands in tests/house/tested_elsewhere.toml needlessly"
    assert all((ROOT / "tests" / test).exists() for test in elsewhere.values())


def untested_files() -> list[str]:
    """Those without a test of their name, and that no test in the folder of their package's tests imports."""
    imported = imported_by_tests()
    found = []
    for name, module in modules().items():
        path = module.path.relative_to(ROOT)
        place = ROOT / "tests" / path.parent
        if not (module.is_package or has_test_of_its_name(path) or any(place in t.parents for t in imported[name])):
            found.append(str(path))
    return found


def has_test_of_its_name(path: Path) -> bool:
    """``a/b.py``: ``tests/a/test_b.py``, ``tests/a/test_b_*.py`` or a folder ``tests/a/b``."""
    place = ROOT / "tests" / path.parent
    return (
        (place / f"test_{path.stem}.py").is_file()
        or any(place.glob(f"test_{path.stem}_*.py"))
        or any((place / path.stem).glob("test_*.py"))
    )


def imported_by_tests() -> dict[str, set[Path]]:
    """Module to the test files that import it, or a name that it defines from a package that offers that."""
    known = modules(*PACKAGES, "tests")
    found: dict[str, set[Path]] = defaultdict(set)
    for module in known.values():
        if module.path.name.startswith("test_"):
            for each in imports(module, known):
                home = home_of(each.name, each.target) if each.name else each.target.name
                found[home].add(module.path)
    return found


def home_of(name: str, package: Module) -> str:
    """The module from which a package has a name that it offers; itself where it defines it."""
    for node in ast.walk(package.tree):
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return origin(package, node)
    return package.name
