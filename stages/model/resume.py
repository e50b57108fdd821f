"""The folder where a stage keeps finished work until the artifact is whole, named after all its inputs.

A run that finds its folder continues there after a kill. Folders of other settings, code or inputs are
useless and are deleted.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from stages.core import identity
from stages.core.files import DATASETS, MODELS, checksum, text_sha256
from stages.core.reading import reading

if TYPE_CHECKING:
    from stages.core.run import Run
    from stages.core.schema import Recipe


def place(at: Path, stage: str, recipe: Recipe, run: Run) -> Path:
    """Return the folder in `at` for this recipe, its inputs and its code; delete all others.

    The folder itself may not exist yet.

    Args:
        stage: the recipe's stage, such as `prune`.
    """
    inputs = [MODELS / recipe.source, *(DATASETS / text.dataset for text in recipe.reads().values())]
    folder = at / _fingerprint(stage, recipe, inputs, run)
    for other in at.glob("*"):
        if other != folder:
            shutil.rmtree(other)
    return folder


def _fingerprint(stage: str, recipe: Recipe, inputs: list[Path], run: Run) -> str:
    """Hash everything a result is computed from: recipe, numerics, seed, inputs, code, versions."""
    files = []
    for folder in inputs:
        with reading(str(folder)):
            files += [(str(file), checksum(file)) for file in sorted(folder.rglob("*")) if file.is_file()]
    code = identity.digest(stage, type(recipe).__module__)
    origins = [
        recipe.model_dump(mode="json"), run.arithmetic(), run.seed, files, code, identity.versions(),
    ]  # fmt: skip
    return text_sha256(json.dumps(origins, sort_keys=True))[:16]
