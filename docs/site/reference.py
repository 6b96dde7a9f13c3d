"""The pages of the API reference, one for each public module of ``pdmd_core``, and the names that they must show.

Sources are parsed, never imported: the site is built without torch.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "pdmd_core"


@dataclass(frozen=True)
class Module:
    """A public module or package.

    Attributes:
        name: Dotted name, ``pdmd_core.experts.folder``.
        path: Its file.
    """

    name: str
    path: Path

    @property
    def is_package(self) -> bool:
        """Whether the file is an ``__init__.py``."""
        return self.path.name == "__init__.py"

    @property
    def page(self) -> str:
        """The path of its page below ``docs``."""
        return f"reference/{self.name}.md"

    @property
    def tree(self) -> ast.Module:
        """The parsed source."""
        return ast.parse(self.path.read_text(encoding="utf-8"))


def public_modules() -> list[Module]:
    """All modules of the library but private ones and commands (``__main__``), packages before what is in them."""
    modules = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            modules.append(Module(".".join(parts), path))
    return sorted(modules, key=lambda module: module.name)


def public_names(module: Module) -> Iterator[str]:
    """Dotted names of what a module defines: classes with their methods and fields, functions, constants, types."""

    def of(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            names: list[str] = []
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                names = [node.name]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            elif isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            for name in names:
                if not name.startswith("_"):
                    yield f"{prefix}.{name}"
                    if isinstance(node, ast.ClassDef):
                        yield from of(node.body, f"{prefix}.{name}")

    yield from of(module.tree.body, module.name)


def exported_names(package: Module) -> dict[str, str]:
    """Names of ``__all__`` that a package takes from its modules, with the module that has each."""
    tree = package.tree
    exported: list[str] = []
    homes: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            parents = package.name.split(".")[: len(package.name.split(".")) - node.level + 1]
            home = ".".join([*parents, *([node.module] if node.module else [])])
            homes.update({alias.asname or alias.name: home for alias in node.names})
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            exported = ast.literal_eval(node.value)
    return {name: homes[name] for name in exported if name in homes}


def defining_module(name: str, module: str, modules: dict[str, Module]) -> str:
    """The module that defines a name which packages may have passed on."""
    while (found := modules.get(module)) is not None and found.is_package:
        exported = exported_names(found)
        if name not in exported:
            break
        module = exported[name]
    return module


def page(module: Module, modules: dict[str, Module]) -> str:
    """The text of a module's page, for mkdocstrings."""
    lines = [f"::: {module.name}"]
    exported = exported_names(module) if module.is_package else {}
    if exported:
        own = [name for name in public_names(module) if name.count(".") == module.name.count(".") + 1]
        members = [name.rpartition(".")[2] for name in own]
        lines += ["    options:", f"      members: {members or False}", "", "## Names that it exports", ""]
        for name in sorted(exported):
            home = defining_module(name, exported[name], modules)
            lines.append(f"- [`{name}`][{home}.{name}]")
    return "\n".join(lines) + "\n"
