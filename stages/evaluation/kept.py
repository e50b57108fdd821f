"""Answers that outlive a kill: a task that was finished is not asked again.

DVC deletes what a stage has written when it starts anew, so answers are kept in `data/scratch/` until the
evaluation is whole. A task's are taken up again only where its requests, the model, the settings, the code
and the state of the random draws are what they were, and the draws go on as they would have: an evaluation
that was killed ends with the bytes of one that was not. Tasks are kept whole, as in bf16 an answer depends
on the batch it is in.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core import identity
from stages.core.files import MODELS, SCRATCH, write_json
from stages.core.lazy import torch

if TYPE_CHECKING:
    from stages.core.run import Run

KEPT = SCRATCH / "answers"

log = logging.getLogger(__name__)


class Finished:
    """The answers of one candidate to one suite, a file a task and kind of request."""

    def __init__(self, candidate: str, suite: str, batch_size: int, run: Run, settings: Any) -> None:
        self._device = run.resolved_device()
        code = [identity.digest("evaluate", type(settings).__module__), identity.versions()]
        key = hashlib.sha256(
            json.dumps([batch_size, run.seed, run.numerics(), _files(MODELS / candidate), code]).encode()
        )
        at = KEPT / f"{candidate}/{suite}".replace("/", "__")
        self._folder = at / key.hexdigest()[:16]
        for other in at.glob("*"):
            if other != self._folder:  # of a model, settings or code that are no more
                shutil.rmtree(other)

    def take(self, kind: str, requests: list[Any], ask: Callable[[], list[Any]]) -> list[Any]:
        """The answers to `requests`, from an earlier run or by `ask`; a likelihood is a list in either case.

        Args:
            kind: of request, as lm-eval names it.
            requests: what is asked, as JSON.
        """
        asked = json.dumps([kind, requests, self._draws()])
        file = self._folder / f"{hashlib.sha256(asked.encode()).hexdigest()}.json"
        if file.exists():
            log.info("%d answers (%s) were finished before", len(requests), kind)
            kept = json.loads(file.read_text())
        else:
            kept = {"answers": ask(), "draws": self._draws()}
            write_json(file, kept)
        self._draw_from(kept["draws"])
        answers: list[Any] = kept["answers"]
        return answers

    def forget(self) -> None:
        """Delete all that is kept; for when the evaluation is written."""
        shutil.rmtree(self._folder.parent, ignore_errors=True)

    def _draws(self) -> list[str]:
        """The state of torch's random draws."""
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return [bytes(state.tolist()).hex() for state in states]

    def _draw_from(self, draws: list[str]) -> None:
        states = [torch.tensor(list(bytes.fromhex(state)), dtype=torch.uint8) for state in draws]
        torch.set_rng_state(states[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self._device)


def _files(folder: Path) -> list[tuple[str, int, int]]:
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found]
