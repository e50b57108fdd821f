"""Checkpoints that a killed training goes on from, in data/scratch, where DVC clears nothing.

There is one at a time, `step-000050.safetensors` with what else is to be known beside it in JSON, in a folder
named after all the training is computed from. The JSON is written last: where it is, the step is whole.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stages.core.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one training, in `folder`, one every `every` steps."""

    def __init__(self, folder: Path, every: int) -> None:
        self._folder, self.every = folder, every

    def last(self) -> tuple[dict[str, Tensor], Any] | None:
        """An arm's state and what else was saved; None where there is no checkpoint that can be read."""
        whole = [int(file.stem.removeprefix("step-")) for file in self._folder.glob("step-*.json")]
        if not whole:
            return None
        file = self._file(max(whole))
        try:
            return load_file(file), json.loads(file.with_suffix(".json").read_text())
        except (OSError, SafetensorError, ValueError) as error:  # a machine that went down as it was written
            log.warning("%s cannot be read (%s): training begins again", file, error)
            self.clear()
            return None

    def save(self, step: int, state: Mapping[str, Tensor], told: Any) -> None:
        """Keep what there is after `step` steps; older checkpoints go.

        Args:
            told: goes through JSON.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / "partial"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, partial)
        partial.replace(self._file(step))
        write_json(self._file(step).with_suffix(".json"), told)
        for file in self._folder.glob("step-*"):
            if file.stem != self._file(step).stem:
                file.unlink()

    def clear(self) -> None:
        """Remove all there are: the training is over, or no run of these settings goes on."""
        shutil.rmtree(self._folder.parent, ignore_errors=True)

    def _file(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}.safetensors"
