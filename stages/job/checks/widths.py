"""Compare the input widths that `models` declares with the models themselves, before anything runs.

The widths follow from a model's config, in its `path:` source or its downloaded copy. A model without a
config on this machine is left to the download, which compares them too. Building a model takes seconds even
without weights, so `data/runs/widths.json` keeps the widths by the hash of the config.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.core import identity
from stages.core.errors import Refusal
from stages.core.files import RUNS, read_json, text_sha256, write_json
from stages.core.reading import reading
from stages.job.checks.counts import checkpoint_of
from stages.job.params import Params

WIDTHS = RUNS / "widths.json"
"""The kept widths."""


def of_widths(params: Params) -> Iterator[str]:
    """Yield models whose `in_features` are not the widths of their linears, and configs that do not load."""
    for key, model in params.models.items():
        folder = checkpoint_of(params, key)
        # A packed model declares no widths, as no recipe compresses it.
        if not model.in_features or folder is None or not (folder / "config.json").exists():
            continue
        try:
            widths = _widths(folder)
        except Refusal as refusal:
            yield f"models.{key}: {refusal}"
            continue
        if widths is not None and widths != model.in_features:
            yield (
                f"models.{key}.in_features is {list(model.in_features)}, but the model has {list(widths)}; "
                f"write in_features: {list(widths)}."
            )


def _widths(folder: Path) -> tuple[int, ...] | None:
    """Return the widths that a checkpoint's config implies; None if its family needs another package.

    Raises:
        Refusal: transformers cannot build the model of this config.
    """
    with reading(f"the config in {folder}"):
        text = (folder / "config.json").read_text(encoding="utf-8")
    key = text_sha256(json.dumps([identity.versions()["transformers"], text]))
    kept: dict[str, Any] = read_json(WIDTHS) if WIDTHS.exists() else {}
    if key not in kept:
        from stages.model.blocks import input_widths  # takes seconds
        from stages.model.skeleton import skeleton_of

        try:
            with reading(f"the config in {folder}"):
                kept[key] = input_widths(skeleton_of(folder))
        except ImportError:
            return None
        write_json(WIDTHS, kept)
    return tuple(kept[key])
