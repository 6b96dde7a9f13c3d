"""How the programs here report what a user can solve: one line on standard error and exit status 2."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable

from pdmd_core.experts.errors import ExpertsError
from pdmd_core.phases import PhasePlanError

NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of a disk that is full or closed to this user."""
NO_PLACE = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
"""Errors of a path that cannot be what it is used as."""


class UserError(Exception):
    """Something that the user can solve; its text is one line that says what was found and what to do."""


SHORT_OF_MEMORY = "use --dtype bfloat16, --batch_size 1, --offload blocks, --decode tiled, or smaller samples"
"""What to do when a program that samples runs out of memory."""


def exit_status(program: str, run: Callable[[], int], when_short: str = "") -> int:
    """Run a program; returns its exit status, 2 for a problem that is reported, 130 when interrupted.

    when_short: what to do when memory runs out.
    """
    try:
        return run()
    except (UserError, ExpertsError, PhasePlanError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_PLACE:
            print(f"{program}: {error.filename}: {os.strerror(error.errno)}", file=sys.stderr)
            return 2
        if when_short and is_out_of_memory(error):
            found = " ".join(str(error).split()).partition(". ")[0]
            print(f"{program}: out of memory ({found[:120]}): {when_short}", file=sys.stderr)
            return 2
        if (reason := _of_the_disk(error)) is None:
            raise
        print(
            f"{program}: {reason}: what was written whole stays; make room or change permissions, and start again "
            "(distill.py with --resume)",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"{program}: stopped", file=sys.stderr)
        return 130


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or this machine, has no memory for what was asked (without importing torch)."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or "DefaultCPUAllocator: " in str(error)


def _of_the_disk(error: Exception) -> str | None:
    """What could not be written and why; None for any other error. safetensors has the number in its text alone."""
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"\bos error (\d+)|\bcode: (\d+)", str(error))):
        number = int(found[1] or found[2])
    if number not in NOT_WRITTEN:
        return None
    return f"{getattr(error, 'filename', None) or 'a file'}: {os.strerror(number)}"
