"""A process between the flow and a stage that ends the stage when the flow ends, however it ends.

The guard's standard input is a pipe that only the flow can write to. The kernel closes it when the flow dies,
even by `kill -9`, and the guard then ends the command and everything the command started: SIGTERM first,
SIGKILL if that does not help. It does the same when it is sent SIGTERM or SIGINT, and to what a killed
command leaves behind. The guard also holds the flow's lock of the workspace (`flows.workspace`), so the next
run waits until nothing of the last is alive.

`kill -9` of the guard itself spares a stage, so that DVC can still lock it. With the option `--bound` the
command dies with the guard even then.

This file runs as a script, without the project or its libraries: `python -IS guard.py [--bound] <command>`.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""
BOUND = "--bound"
_AT_DEATH_OF_PARENT = 1  # PR_SET_PDEATHSIG


def main(command: list[str]) -> int:
    """Run the command in a process group of its own and return its exit code."""
    bound = command[0] == BOUND
    kernel = ctypes.CDLL(None)
    child = subprocess.Popen(
        command[bound:], stdin=subprocess.DEVNULL, start_new_session=True,
        preexec_fn=(lambda: kernel.prctl(_AT_DEATH_OF_PARENT, signal.SIGKILL)) if bound else None,
    )  # fmt: skip

    def end_with_the_flow() -> None:
        while os.read(0, 1):
            pass
        end_group(child.pid)

    def end_at_signal(*_: object) -> None:
        # In a thread, as this one waits for the child, which stays in its group until it is waited for.
        threading.Thread(target=end_group, args=(child.pid,)).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end_at_signal)
    threading.Thread(target=end_with_the_flow, daemon=True).start()
    code = child.wait()
    end_group(child.pid)
    return code if code >= 0 else 128 - code


def end_group(group: int) -> None:
    """End every process of a group; return when none is left or SIGKILL was sent."""
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 1.0)):
        deadline = time.monotonic() + seconds
        alive = _signal(group, number)
        while alive and time.monotonic() < deadline:
            time.sleep(0.02)
            alive = _signal(group, 0)
        if not alive:
            return


def _signal(group: int, number: int) -> bool:
    """Signal a process group; return whether any of it is alive."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
