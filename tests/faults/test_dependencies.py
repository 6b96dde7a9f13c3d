"""Each dependency has a reason, a pin and a use: pyproject.toml, constraints.txt and docs/dependencies.md agree."""

from __future__ import annotations

import ast
import re
import runpy
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = {"pdmd_core", "training", "benchmarks", "comfy_nodes", "docs", "tests"}
OF_COMFYUI = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "nodes", "server", "aiohttp"}
"""Modules of the program that loads the node pack, and what it brings itself."""


def declared() -> dict[str, dict[str, Requirement]]:
    """Extra to its packages, by their canonical names; this package's own extras left out."""
    extras = {extra: [Requirement(text) for text in texts] for extra, texts in PROJECT["optional-dependencies"].items()}
    return {
        extra: {canonicalize_name(r.name): r for r in found if canonicalize_name(r.name) != PROJECT["name"]}
        for extra, found in extras.items()
    }


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [line.partition("==") for line in lines if line and not line.startswith("#")]
    assert all(equals and version for _, equals, version in found), "every line is an exact version"
    names = [canonicalize_name(name) for name, _, _ in found]
    assert len(set(names)) == len(names), "no package twice"
    return dict(zip(names, (version for _, _, version in found), strict=True))


def table() -> dict[str, set[str]]:
    """Package to extras, as the page has them; every reason has some length."""
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| ([\w, -]+) \| (.+) \|$", page, re.MULTILINE)
    assert all(len(why) > 4 for _, _, why in rows)
    return {canonicalize_name(name): set(extras.split(", ")) for name, extras, _ in rows}


def test_the_library_itself_needs_nothing() -> None:
    assert PROJECT["dependencies"] == []


def test_each_dependency_has_a_reason_on_the_page_and_each_reason_a_dependency() -> None:
    expected: dict[str, set[str]] = {}
    for extra, packages in declared().items():
        for name in packages:
            expected.setdefault(name, set()).add(extra)
    assert table() == expected


def test_each_dependency_is_pinned_to_a_version_that_it_allows() -> None:
    pinned = pins()
    for packages in declared().values():
        for name, requirement in packages.items():
            assert name in pinned, f"{name} is not in constraints.txt"
            assert requirement.specifier.contains(pinned[name], prereleases=True), f"{requirement}: {pinned[name]}"


def test_the_lowest_versions_that_are_allowed_are_tested() -> None:
    """By ``make test-versions``."""
    lines = (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    tested = {canonicalize_name(r.name): r for r in map(Requirement, lines[1:])}
    found = declared()["diffusers"]
    floors = {name: str(requirement.specifier) for name, requirement in found.items() if requirement.specifier}
    assert set(floors) - {"torch"} <= set(tested)
    for name in set(floors) - {"torch"}:
        (lowest,), (version,) = SpecifierSet(floors[name]), tested[name].specifier
        assert (lowest.operator, Version(lowest.version)) == (">=", Version(version.version)), name
    versions = runpy.run_path(str(ROOT / ".ci" / "versions.py"))
    oldest, (torch,) = versions["ROWS"]["oldest"], SpecifierSet(floors["torch"])
    assert Version(oldest.torch.removeprefix("torch==")) == Version(torch.version)
    assert oldest.python == PROJECT["requires-python"].removeprefix(">=")
    assert all((ROOT / "tests" / "pdmd_core" / part).exists() for part in versions["PART"])


def test_what_the_dependencies_need_is_pinned_too() -> None:
    """Nothing that pip would install into a fresh environment is of a version that was never tested."""
    pinned = pins()
    environment = {str(key): str(value) for key, value in default_environment().items()}
    todo, seen = [(name, "") for packages in declared().values() for name in packages], set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for text in requires(name) or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate(environment | {"extra": extra}):
                todo += [(canonicalize_name(needed.name), each) for each in ("", *needed.extras)]
    cuda = {
        name for name, _ in seen if name.startswith(("nvidia-", "cuda-")) or name == "triton"
    }  # of other torch builds
    assert {name for name, _ in seen} - cuda - {"pip", "setuptools"} <= set(pinned)


def test_each_third_package_that_is_imported_is_a_dependency() -> None:
    distributions = packages_distributions()
    known = {name for packages in declared().values() for name in packages}
    unknown = set()
    for part in ("pdmd_core", "training", "benchmarks", "comfy_nodes", "docs"):
        for path in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module or ""]
                for name in (
                    {name.partition(".")[0] for name in names} - OURS - OF_COMFYUI - set(sys.stdlib_module_names)
                ):
                    if (path.parent / f"{name}.py").exists():
                        continue  # a neighbour, in folders of scripts
                    if not known & {canonicalize_name(d) for d in distributions.get(name, ())}:
                        unknown.add(f"{path.relative_to(ROOT)}: {name}")
    assert not unknown
