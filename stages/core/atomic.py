"""Writes that happen whole or not at all, so that a killed stage leaves nothing half made.

A folder is made in `data/scratch/` and moved into place at the end. DVC deletes a stage's outputs before
it runs, so anything that must outlive a kill belongs in scratch too.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRATCH = Path("data/scratch")


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """A scratch folder that becomes `target` if the body ends well, and vanishes if it does not."""
    partial = SCRATCH / "partial" / "__".join(target.parts)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _readable(partial)
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _readable(folder: Path) -> None:
    """Give files the permissions any new file has; some writers make theirs private."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all, keys in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(value, indent=2) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
