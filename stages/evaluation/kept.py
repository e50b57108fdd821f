"""Answers that survive a kill: a task that was finished is not asked again.

DVC deletes a stage's outputs before it runs it again, so answers are kept in `data/scratch/` until the
evaluation is written. They are used again only if the requests, the model, the settings, the code and the
state of the random draws are the same, and that state is then moved on as well: an evaluation that was killed
ends with the same bytes as one that was not. Tasks are kept whole, because in bf16 an answer depends on its
batch.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core import identity
from stages.core.files import MODELS, SCRATCH, read_json, text_sha256, write_json
from stages.core.lazy import torch

if TYPE_CHECKING:
    from stages.core.run import Run

ANSWERS = SCRATCH / "answers"

log = logging.getLogger(__name__)


class KeptAnswers:
    """The answers of one candidate to one suite, a file for each task and kind of request.

    Args:
        module: the module of the suite's kind; its code decides on answers.
        engine: what the model computes in, with its version where no lock file pins it.
    """

    def __init__(
        self, candidate: str, suite: str, batch_size: int, run: Run, module: str, engine: str
    ) -> None:
        self._device = run.resolved_device()
        code = [identity.digest("evaluate", module), identity.versions()]
        key = json.dumps([batch_size, run.seed, run.arithmetic(), _files(MODELS / candidate), code, engine])
        folder = ANSWERS / f"{candidate}/{suite}".replace("/", "__")
        self._folder = folder / text_sha256(key)[:16]
        for other in folder.glob("*"):
            if other != self._folder:  # its model, settings or code have changed
                shutil.rmtree(other)

    def take(self, kind: str, requests: list[Any], ask: Callable[[], list[Any]]) -> list[Any]:
        """Return the answers to `requests`, from an earlier run or from `ask`.

        Args:
            kind: the kind of request, as lm-eval names it.
            requests: JSON values; answers are JSON too, so a tuple may come back as a list.
        """
        key = json.dumps([kind, requests, self._random_state()])
        file = self._folder / f"{text_sha256(key)}.json"
        if file.exists():
            log.info("%d answers (%s) are kept from an earlier run", len(requests), kind)
            kept = read_json(file)
        else:
            kept = {"answers": ask(), "draws": self._random_state()}
            write_json(file, kept)
        self._set_random_state(kept["draws"])
        answers: list[Any] = kept["answers"]
        return answers

    def forget(self) -> None:
        """Delete all kept answers, once the evaluation is written."""
        shutil.rmtree(self._folder.parent, ignore_errors=True)

    def _random_state(self) -> list[str]:
        """Return the state of torch's random generators as hexadecimal digits, that of the CPU first."""
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return [bytes(state.tolist()).hex() for state in states]

    def _set_random_state(self, digits: list[str]) -> None:
        states = [torch.tensor(list(bytes.fromhex(state)), dtype=torch.uint8) for state in digits]
        torch.set_rng_state(states[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self._device)


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Return name, size and time of every file."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
