"""Tells diffusers that this package has a scheduler, without importing diffusers.

diffusers downloads a pipeline from the Hub when each of its components is of a library in a table of its own. The entry
is made when that table is there: at once, or when diffusers is imported after this package.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_TABLE = "diffusers.pipelines.pipeline_loading_utils"
_PACKAGE = __name__.rpartition(".")[0]


def tell_diffusers() -> None:
    """Make the entry now, or as soon as diffusers' table is imported."""
    if _TABLE in sys.modules:
        _enter(sys.modules[_TABLE])
    else:
        sys.meta_path.insert(0, _AtImport())


class _AtImport(MetaPathFinder):
    """Finds the module of the table as others would, and makes the entry after it ran."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Answer for the table's module, once.

        Args:
            fullname: The module that is imported.
            path: Where its package is.
            target: As of all finders; not used.

        Returns:
            The specification of the table's module; None for every other module.
        """
        if fullname != _TABLE or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_enter(module: ModuleType) -> None:
                run(module)
                _enter(module)

            spec.loader.exec_module = run_and_enter  # type: ignore[method-assign]
        return spec


def _enter(table: ModuleType) -> None:
    table.LOADABLE_CLASSES[_PACKAGE] = {"SchedulerMixin": ["save_pretrained", "from_pretrained"]}
