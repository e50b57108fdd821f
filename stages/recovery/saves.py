"""Checkpoints from which a killed training resumes, in data/scratch, where DVC clears nothing.

There is one at a time, `step-000050.safetensors` with the progress beside it in JSON, in a folder named after
all that the training is computed from. The JSON is written last: where there is one, the checkpoint is
complete.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.files import read_json, replacing, write_json

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one training, in `folder`, one per `every` steps."""

    def __init__(self, folder: Path, every: int) -> None:
        self._folder, self.every = folder, every

    def last(self) -> tuple[dict[str, Tensor], Any] | None:
        """Return the arm's state and the progress of the last checkpoint; None if there is none to read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        steps = [int(file.stem.removeprefix("step-")) for file in self._folder.glob("step-*.json")]
        if not steps:
            return None
        file = self._file(max(steps))
        try:
            return load_file(file), read_json(file.with_suffix(".json"))
        except (OSError, SafetensorError, ValueError) as error:  # the machine crashed while it was written
            log.warning("%s cannot be read (%s): training starts over", file, error)
            self.clear()
            return None

    def save(self, step: int, state: Mapping[str, Tensor], progress: Any) -> None:
        """Write the checkpoint after `step` steps, and delete older ones.

        Args:
            state: the arm's.
            progress: anything that JSON holds.
        """
        from safetensors.torch import save_file

        file = self._file(step)
        with replacing(file) as partial:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, partial)
        write_json(file.with_suffix(".json"), progress)
        for other in self._folder.iterdir():
            if other.stem != file.stem:
                other.unlink()

    def clear(self) -> None:
        """Delete all checkpoints of this recipe, those of other settings too."""
        shutil.rmtree(self._folder.parent, ignore_errors=True)

    def _file(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}.safetensors"
