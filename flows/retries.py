"""Which failed stages run again, and after which pause.

Only what may pass by itself is tried again: the network, memory of a card that another program took, memory
of the machine if other stages ran beside. The stage says so in its run record (`stages.job.transient`). A
stage that was killed (exit code 137, as by the kernel's out-of-memory killer) says nothing, and counts as
short of memory. What was short of memory runs again alone.

Prefect counts and repeats the tries (`flows.compare`). The pause is here, as ctrl-C could not end Prefect's.
"""

import random
import re
import threading
from typing import Any

from flows import machine
from flows.resources import Lease
from stages.job.transient import Passing

TRIES = 4
"""How often a stage runs again at most."""
_KILLED = re.compile(r"exited with (137|-9)$", re.M)
"""DVC's words for the exit code of a command that was killed."""
_OTHERS = 2**29
"""More than these bytes in use after the stage ended mean that another program is on the card."""
_REASONS: dict[Passing, str] = {
    "network": "the network may be back",
    "card": "another program was on its card",
    "memory": "stages beside it may have taken the memory",
}


class Retries:
    """The failures of a run that may pass.

    Attributes:
        alone: stages that run again with nothing beside them.
    """

    def __init__(self, pause: float = 5.0) -> None:
        """Begin a run.

        Args:
            pause: seconds before the first retry; each further pause is twice as long.
        """
        self.alone: set[str] = set()
        self._pause = pause
        self._tries: dict[str, int] = {}
        self._pauses: dict[str, float] = {}

    def note(self, name: str, cause: Passing | None, lease: Lease) -> str | None:
        """Note a failure; say when and why the stage runs again, or return None if it does not.

        Args:
            cause: what the stage ran short of.
            lease: what it held.
        """
        tries = self._tries.get(name, 0) + 1
        if tries > TRIES or not cause or not _passes(cause, lease):
            return None
        if cause == "memory":
            self.alone.add(name)
        self._tries[name] = tries
        # Jitter, so that stages that failed together do not retry together.
        seconds = self._pauses[name] = self._pause * 2 ** (tries - 1) * random.uniform(0.75, 1.25)
        alone = " alone" if name in self.alone else ""
        return f"runs again{alone} in {seconds:.0f} s ({tries} of {TRIES}), as {_REASONS[cause]}"

    def due(self, name: str) -> bool:
        """Tell whether the stage's last failure is to be tried again."""
        return name in self._pauses

    def wait(self, name: str, stopped: threading.Event) -> None:
        """Wait until the stage may run again; return at once if it has not failed or the run is stopped."""
        stopped.wait(self._pauses.pop(name, 0.0))


def cause_of(record: dict[str, Any], code: int, output: str) -> Passing | None:
    """Return what a failed stage ran short of.

    Args:
        record: the run record that it wrote; empty if it wrote none.
        code: the exit code of DVC, or of the guard that runs it.
        output: all that DVC and the stage printed.
    """
    if not record and was_killed(code, output):
        return "memory"
    cause = record.get("passing")
    return cause if cause in _REASONS else None


def was_killed(code: int, output: str) -> bool:
    """Tell whether SIGKILL ended a stage or the DVC command that ran it, by the latter's code and output."""
    return code == 137 or bool(_KILLED.search(output))


def _passes(cause: Passing, lease: Lease) -> bool:
    """Tell whether whatever was short was taken by others."""
    if cause == "card":
        return lease.card is not None and max(lease.occupied, machine.occupied(lease.card)) > _OTHERS
    return cause == "network" or lease.beside
