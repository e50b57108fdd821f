"""One stage as a child process: its output is shown and kept, and all its processes end when the run stops.

DVC does not pass a signal on to the command it runs. So each `dvc repro` runs under a guard (`flows.guard`),
which ends it with all its processes as soon as the flow closes the guard's standard input, or dies.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import IO

from flows import guard
from flows.graph import DVC
from flows.workspace import BUSY, Busy, insist
from stages.core.files import RUNS

LOGS = RUNS / "logs"
GUARD = (sys.executable, "-IS", guard.__file__)
CHATTER = re.compile(
    r"|To track the changes with git, run:|\s*git add .*|To enable auto staging, run:"
    r"|\s*dvc config core.autostage true|Use `dvc push` .*|(Updating|Generating) lock file .*"
    r"|.* is busy, it is being blocked by:|  \(PID \d+\): .*|If there are no processes with such PIDs.*"
    r"|.*had been killed\. Auto removed it.*|.*Unable to acquire lock\..*|.*Unable to read RWLock-file.*"
)
"""DVC's output to hide: what it repeats at every stage, advice to delete lock files."""


class Children:
    """The child processes of one run.

    Attributes:
        elsewhere: whether the stages run on other machines, so that they do not share this one.
        say: called with a stage and what the run itself has to say about it, such as what it waits for.
    """

    elsewhere = False

    def __init__(self, held: tuple[int, ...] = ()) -> None:
        """Take the open files that each guard holds as well, as long as it lives."""
        self.held = held
        self.say: Callable[[str, str], None] = lambda stage, text: None
        self.stopped = threading.Event()
        self._alive: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()

    def repro(
        self,
        stage: str,
        show: Callable[[str], None],
        force: bool = False,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[int, str]:
        """Run `dvc repro --single-item <stage>` and return its exit code and output; wait for what blocks it.

        Args:
            show: called with each line of the command worth showing, as it comes.
            force: whether to run the stage even if DVC has its result.
            variables: added to its environment.

        Raises:
            InterruptedError: the run was stopped before or during the stage.
        """
        attempt = partial(self._repro, stage, show, force, variables)
        return insist(attempt, partial(self.say, stage), self.stopped.wait)

    def _repro(
        self, stage: str, show: Callable[[str], None], force: bool, variables: Mapping[str, str]
    ) -> tuple[int, str]:
        command = [*DVC, "repro", "--single-item", *(["--force"] if force else []), stage]
        with self._lock:
            if self.stopped.is_set():
                raise InterruptedError(stage)
            child = subprocess.Popen(
                [*GUARD, *command],
                env={**environment(), **variables},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
                pass_fds=self.held,
            )
            self._alive.add(child)
        assert child.stdin is not None and child.stdout is not None
        log = log_of(stage)
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with child.stdout, log.open("wb", buffering=0) as file:
                output = _follow(child.stdout, file, show)
            code = child.wait()
        finally:
            child.stdin.close()  # ends the stage if it still runs
            child.wait()
            with self._lock:
                self._alive.discard(child)
        if self.stopped.is_set():
            raise InterruptedError(stage)
        if code and BUSY.search(output):
            raise Busy(output)
        return code, output

    def gather(self) -> None:
        """Collect results from other machines; child processes leave theirs here."""

    def stop(self) -> None:
        """Start no further child, and end the running children with all their descendants."""
        with self._lock:
            self.stopped.set()
            children = set(self._alive)
        for child in children:
            assert child.stdin is not None
            child.stdin.close()
        deadline = time.monotonic() + guard.GRACE + 2
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))


def log_of(stage: str) -> Path:
    """Return the file that keeps all that a stage's last run printed."""
    return LOGS / f"{stage.replace('/', '--')}.log"


def run_guarded(command: Sequence[str], stopped: threading.Event) -> subprocess.CompletedProcess[str]:
    """Run a command under a guard, so that it ends with this process; return its exit code and output.

    Args:
        stopped: ends it when it is set.

    Raises:
        InterruptedError: it was stopped.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = subprocess.Popen(
            [*GUARD, *command], env=environment(), stdin=subprocess.PIPE, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        assert child.stdin is not None
        try:
            while child.poll() is None:
                if stopped.wait(0.1):
                    raise InterruptedError(" ".join(command))
        finally:
            child.stdin.close()
            child.wait()
        output.seek(0)
        return subprocess.CompletedProcess(command, child.returncode, output.read())


def environment() -> dict[str, str]:
    """Return a stage's environment: this interpreter as `python`, and bars that print every two seconds."""
    return {
        "TQDM_MININTERVAL": "2",
        "DVC_NO_ANALYTICS": "1",
        "PYTHONUNBUFFERED": "1",
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }


def _follow(stream: IO[str], file: IO[bytes], show: Callable[[str], None]) -> str:
    """Copy a stream to `file` line by line, each redrawn bar as a line, and return all of it."""
    lines = []
    for raw in stream:  # text mode ends a line at \r too
        line = raw.rstrip()
        with contextlib.suppress(OSError):  # a full disk ends no stage that needs no more of it
            file.write(f"{line}\n".encode())
        lines.append(line)
        if not CHATTER.fullmatch(line):
            show(line)
    return "\n".join(lines)
