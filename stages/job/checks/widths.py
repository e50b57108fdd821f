"""The input widths that `models` declares, against the models themselves, before anything runs.

A downloaded model has them in its record. Of a checkpoint in a `path:` source they follow from its config, by
the function that the stage uses; building the model without weights takes seconds, so they are kept in
`data/runs/widths.json` by the hash of the config. Others are left to the stage.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.core import identity
from stages.core.errors import Refusal
from stages.core.files import MODELS, RECORD, RUNS, read_json, text_sha256, write_json
from stages.core.reading import reading
from stages.job.params import Params
from stages.sources.base import Model
from stages.sources.origin import portable
from stages.sources.safetensors import Safetensors

WIDTHS = RUNS / "widths.json"
"""The kept widths."""


def of_widths(params: Params) -> Iterator[str]:
    """Yield models whose `in_features` are not those of their linears, or whose config cannot be read."""
    for key, model in params.models.items():
        try:
            widths = _widths(key, model)
        except Refusal as refusal:
            yield f"models.{key}: {refusal}"
            continue
        if widths is not None and widths != model.in_features:
            yield (
                f"models.{key}.in_features is {list(model.in_features)}, but the model has {list(widths)}; "
                f"write in_features: {list(widths)}."
            )


def _widths(key: str, model: Model) -> tuple[int, ...] | None:
    """Return the widths of a model that is on this machine; None if it is not, or they take its weights."""
    if not model.in_features:  # a packed model, which no recipe compresses
        return None
    record = MODELS / "base" / key / RECORD
    if record.exists():
        settings, known = portable(model.model_dump(mode="json")), read_json(record)["base"]
        if (settings | {"in_features": known["in_features"]}).items() <= known.items():
            return tuple(known["in_features"])
    if not isinstance(model, Safetensors) or not model.source.startswith("path:"):
        return None
    folder = Path(model.source.removeprefix("path:")) / model.folder
    return _of_config(folder) if (folder / "config.json").exists() else None


def _of_config(folder: Path) -> tuple[int, ...] | None:
    """Return the widths that a checkpoint's config implies; None if its family needs another package.

    Raises:
        Refusal: transformers cannot build the model of this config.
    """
    with reading(f"the config of path:{folder}"):
        text = (folder / "config.json").read_text(encoding="utf-8")
    key = text_sha256(json.dumps([identity.versions()["transformers"], text]))
    kept: dict[str, Any] = read_json(WIDTHS) if WIDTHS.exists() else {}
    if key not in kept:
        from stages.model.skeleton import input_widths, skeleton_of  # takes seconds

        try:
            with reading(f"the config of path:{folder}"):
                kept[key] = input_widths(skeleton_of(folder))
        except ImportError:
            return None
        write_json(WIDTHS, kept)
    return tuple(kept[key])
