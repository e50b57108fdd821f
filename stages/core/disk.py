"""A full disk: how errors and the output of commands speak of it, and what the user reads."""

import errno
import re
from pathlib import Path

_FULL = re.compile(
    r"no space (is )?left|\(?\[?os error (28|122)\b|\[Errno (28|122)\]|Disk quota exceeded|disk is full", re.I
)


def is_full(error: Exception | str) -> bool:
    """Tell whether an error or a command's output speaks of a full disk or quota."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return bool(_FULL.search(str(error)))


def full() -> str:
    """Say that the disk is full, and what to do."""
    return (
        f"no space is left on the disk of {Path.cwd()}; what was finished is kept. Free some (dvc gc "
        "--workspace drops what no recipe needs any more) and run it again."
    )
