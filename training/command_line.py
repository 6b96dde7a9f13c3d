"""How the programs here report what a user can solve: one line on standard error and exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pdmd_core.experts.manifest import ExpertsError
from pdmd_core.phases import PhasePlanError


class UserError(Exception):
    """Something that the user can solve; its text is one line that says what was found and what to do."""


def exit_status(program: str, run: Callable[[], int]) -> int:
    """Run a program; returns its exit status, 2 for a problem that is reported, 130 when interrupted."""
    try:
        return run()
    except (UserError, ExpertsError, PhasePlanError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: stopped", file=sys.stderr)
        return 130
