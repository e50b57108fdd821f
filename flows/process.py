"""One stage as a child process: its output is shown and kept, and all its processes end when the run stops.

DVC does not pass a signal on to the command it runs. So each `dvc repro` leads a process group of its own,
and the group gets SIGTERM first and SIGKILL if it is still alive.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from flows.graph import DVC
from stages.core.files import RUNS

LOGS = RUNS / "logs"
GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""
CHATTER = re.compile(
    r"|To track the changes with git, run:|\s*git add .*|To enable auto staging, run:"
    r"|\s*dvc config core.autostage true|Use `dvc push` .*|(Updating|Generating) lock file .*"
    r"|.*:\s+0%\|.*"
)
"""Lines that DVC repeats at every stage, and bars that have not begun."""


class Children:
    """The child processes of one run."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._alive: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()

    def repro(self, stage: str, show: Callable[[str], None], force: bool = False) -> tuple[int, str]:
        """Run `dvc repro --single-item <stage>` and return its exit code and output.

        Args:
            show: called with each line worth showing, as it comes.
            force: whether to run the stage even if DVC has its result.

        Raises:
            InterruptedError: the run was stopped before or during the stage.
        """
        with self._lock:
            if self.stopped.is_set():
                raise InterruptedError(stage)
            child = subprocess.Popen(
                [*DVC, "repro", "--single-item", *(["--force"] if force else []), stage],
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self._alive.add(child)
        assert child.stdout is not None
        log = LOGS / f"{stage.replace('/', '--')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with child.stdout, log.open("w") as file:
                output = _follow(child.stdout, file, show)
            code = child.wait()
        finally:
            with self._lock:
                self._alive.discard(child)
        if self.stopped.is_set():
            raise InterruptedError(stage)
        return code, output

    def stop(self) -> None:
        """Start no further child, and end the running children with all their descendants."""
        with self._lock:
            self.stopped.set()
            groups = {child.pid for child in self._alive}
        for group in groups:
            _signal(group, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and any(_signal(group, 0) for group in groups):
            time.sleep(0.05)
        for group in groups:
            _signal(group, signal.SIGKILL)


def environment() -> dict[str, str]:
    """Return a stage's environment: this interpreter as `python`, and bars that print every ten seconds."""
    return {
        "TQDM_MININTERVAL": "10",
        "DVC_NO_ANALYTICS": "1",
        "PYTHONUNBUFFERED": "1",
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }


def _follow(stream: IO[str], file: IO[str], show: Callable[[str], None]) -> str:
    """Copy a stream to `file` line by line, each redrawn bar as a line, and return all of it."""
    lines = []
    for raw in stream:  # text mode ends a line at \r too
        line = raw.rstrip()
        file.write(f"{line}\n")
        file.flush()
        lines.append(line)
        if not CHATTER.fullmatch(line):
            show(line)
    return "\n".join(lines)


def _signal(group: int, number: int) -> bool:
    """Signal a process group; return whether any of it is alive."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
