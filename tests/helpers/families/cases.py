"""The cases of all families, which tests run through."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

from pdmd_core.families import FAMILIES
from tests.helpers.families import others
from tests.helpers.families.case import Case


def _named(cases: dict[str, Case]) -> dict[str, Case]:
    return {name: replace(case, name=name) for name, case in cases.items()}


BY_FAMILY = {name: _named(import_module(f"tests.helpers.families.{name}").CASES) for name in FAMILIES}
"""Family to its cases, from the module of its name."""
OF_FAMILIES = {name: case for cases in BY_FAMILY.values() for name, case in cases.items()}
RESUMED = ["wan_two", *(next(iter(cases)) for family, cases in BY_FAMILY.items() if family != "wan")]
"""A case of each family."""
CASES = OF_FAMILIES | _named(others.CASES)
"""With pipelines that are of no family."""
