"""Where work that may be killed leaves what it has finished: a folder named after all it is computed from.

A run that finds its folder goes on there; folders of other settings, code or inputs are of no use to anyone.
"""

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.artifact import MODELS
from stages.core.calibration import DATASETS
from stages.core.reading import reading
from stages.core.run import RECORDED

if TYPE_CHECKING:
    from stages.core.run import Run


def place(at: Path, recipe: Mapping[str, Any], dataset: str, run: "Run") -> Path:
    """The folder in `at` for these settings and inputs, which may not be there; all others are removed.

    Args:
        recipe: its settings; its `source` is an input.
        dataset: the data set that is read, another input; `none` for none.
    """
    found = at / _fingerprint(recipe, [MODELS / recipe["source"], DATASETS / dataset], run)
    for other in at.glob("*"):
        if other != found:
            shutil.rmtree(other)
    return found


def _fingerprint(recipe: Mapping[str, Any], inputs: list[Path], run: "Run") -> str:
    """A name for everything a result is computed from: recipe, code, machine, inputs."""
    files = []
    for folder in inputs:
        with reading(str(folder)):
            files += [(str(file), sha256(file)) for file in sorted(folder.rglob("*")) if file.is_file()]
    root = Path(__file__).parents[2]
    code = [file.read_bytes() for file in sorted((root / "stages").rglob("*.py"))]
    versions = {name: importlib.metadata.version(name) for name in RECORDED}
    digest = hashlib.sha256(b"".join(code))
    digest.update(json.dumps([recipe, run.numerics(), run.seed, files, versions], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def sha256(file: Path) -> str:
    """The sha256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
