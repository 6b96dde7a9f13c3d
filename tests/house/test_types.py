"""mypy is strict in ``pdmd_core`` (pyproject.toml); ``Any`` stands only where another library or JSON comes in."""

from __future__ import annotations

import ast
import tomllib

from tests.helpers.source import ROOT, Module, modules, origin

BORDERS = {"accelerate", "argparse", "diffusers", "huggingface_hub", "json", "peft", "tqdm", "transformers"}
"""Libraries whose values have no types of their own, or types that cannot be told."""
JSON = {"pdmd_core.experts.format.untrusted"}
"""Files of ours that give out JSON."""
STRICT = {
    "disallow_any_generics",
    "disallow_incomplete_defs",
    "disallow_subclassing_any",
    "disallow_untyped_calls",
    "disallow_untyped_decorators",
    "warn_return_any",
}
"""What ``mypy --strict`` sets beyond what is set for all packages."""
FOR_ALL = {"check_untyped_defs", "disallow_untyped_defs", "extra_checks", "strict_equality"}
FOR_ALL |= {"warn_redundant_casts", "warn_unused_ignores"}


def test_mypy_is_strict_in_the_library() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    (strict,) = (part for part in settings["overrides"] if "pdmd_core.*" in part["module"])
    assert {name for name, value in strict.items() if value is True} == STRICT
    assert {name for name, value in settings.items() if value is True} >= FOR_ALL
    assert settings["implicit_reexport"] is False
    assert "tests/helpers/typed_use.py" in settings["files"], "what a type checker knows of the code of users"


def test_any_stands_at_the_borders_alone() -> None:
    inside = []
    for module in modules("pdmd_core").values():
        if mentions_any(module.tree) and not comes_from(module) & (BORDERS | JSON):
            inside.append(str(module.path.relative_to(ROOT)))
    assert not inside, "object, or the type itself, says more"


def mentions_any(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))


def comes_from(module: Module) -> set[str]:
    """The libraries, and the files of ours, that a file imports from."""
    found: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = origin(module, node)
            found |= {base, base.partition(".")[0], *(f"{base}.{alias.name}" for alias in node.names)}
    return found
