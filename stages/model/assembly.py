"""Putting the parts of a streamed model together into a checkpoint's safetensors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from safetensors import safe_open
from safetensors.torch import save_file

from stages.core.files import write_json
from stages.model.artifact import ONE_FILE
from stages.model.names import as_stored

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CheckpointPart: TypeAlias = Path | str
"""A block's shard, or the name of a tensor outside the blocks."""


def write_tensors(
    folder: Path,
    model: PreTrainedModel,
    parts: Sequence[CheckpointPart],
    load: Callable[[CheckpointPart], Mapping[str, Tensor]],
    size: int,
    *,
    packed: bool,
) -> None:
    """Write a checkpoint's safetensors: a single file if small, else a file per part and an index.

    Args:
        load: returns the tensors of a part by their names in the model.
        size: bytes of all parts.
        packed: see `stages.model.names.as_stored`.
    """

    def stored(part: CheckpointPart) -> dict[str, Tensor]:
        tensors = as_stored(model, load(part), packed=packed)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    if size < ONE_FILE:
        tensors = {name: tensor for part in parts for name, tensor in stored(part).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    index: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        target = folder / f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = stored(part)
        index |= dict.fromkeys(tensors, target.name)
        if isinstance(part, Path) and tensors.keys() == _names(part):
            _link(part, target)  # the shard stays until the artifact is whole
        else:
            save_file(tensors, target, metadata={"format": "pt"})
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}
    write_json(folder / "model.safetensors.index.json", content)


def copy_generation_config(source: Path, folder: Path) -> None:
    """Copy the source's generation_config.json, if there is one, into `folder`."""
    if (source / "generation_config.json").exists():
        shutil.copy(source / "generation_config.json", folder)


def _link(file: Path, target: Path) -> None:
    """Link `target` to `file`, or copy it where the file system has no links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _names(file: Path) -> set[str]:
    with safe_open(file, "pt") as handle:
        return set(handle.keys())
