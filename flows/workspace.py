"""One run a workspace at a time, a flow or `dvc repro` alike; whoever comes second waits.

A flow holds a lock of the kernel (flock) on `.dvc/tmp/prunequant.lock`. It ends with the last process that
has the file open: the flow and the guards of its stages (`flows.guard`). So after `kill -9` of a flow the
next waits until the stages of the first have ended, and there is never a file to delete by hand.

A bare `dvc repro` knows nothing of this lock. DVC notes in `.dvc/tmp/rwlock` which process reads and writes
which path. A flow waits until no living process is in there, then adds itself, as the writer of `stages`.
Stage `code` reads that folder and every `dvc repro` begins with it: so a bare one started beside a flow ends
there with DVC's message, before it has deleted or computed anything.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any, TypeVar

import psutil

from flows.exporting import EXPORTING
from flows.guard import GRACE
from flows.terminal import console
from stages.core.files import SCRATCH, write_text

Result = TypeVar("Result")
DVC_TMP = Path(".dvc/tmp")
BUSY = re.compile(
    r"is busy, it is being blocked by:|Unable to acquire lock\. Most likely another DVC|"
    r"Unable to read RWLock-file|RWLock-file .* format error"
)
"""What a DVC command says that failed only because of another process."""
_RWLOCK = DVC_TMP / "rwlock"
_HELD = DVC_TMP / "prunequant.lock"
_DOOR = "stages"
"""A path that a flow write-locks. Stage `code`, first in every `dvc repro`, reads it and is refused."""


@contextlib.contextmanager
def alone() -> Iterator[tuple[int, ...]]:
    """Wait until no other run works here, then keep others out until the body ends.

    Yields:
        the open file that holds the lock, for the guards of stages to hold as well; nothing where there is no
        DVC project, which whoever reads the graph refuses.
    """
    if not Path(".dvc").is_dir():
        yield ()
        return
    DVC_TMP.mkdir(exist_ok=True)
    with _HELD.open("a+") as file:
        _wait_for_flow(file)
        release()  # of an earlier process that had the same id
        _when_idle(_end_orphans)
        try:
            yield (file.fileno(),)
        finally:
            release()


def claim() -> None:
    """Keep bare `dvc repro` out from now on; wait for what has begun meanwhile.

    Call it after stage `code` has run, as that reads the same folder, and after `dvc status`.
    """
    _when_idle(lambda root, table: table["write"].update({f"{root}/{_DOOR}": _me()}))


def clear_scratch() -> None:
    """Delete what killed stages left to continue from, once no DVC command works here.

    A stage deletes its own when it ends. The rest is of recipes that were edited, or restored from the cache;
    if all is up to date, no stage needs it.
    """
    left = [each for each in SCRATCH.glob("*") if not each.name.startswith(EXPORTING)]  # an export may work

    def delete(*_: Any) -> None:
        for each in left:
            shutil.rmtree(each, ignore_errors=True)

    if left:
        _when_idle(delete)


class Busy(Exception):
    """Another process blocks what DVC was to do; the text is DVC's."""


def refuse_busy() -> None:
    """Refuse to go on while a DVC command runs a stage here; call it with DVC's own lock held.

    Raises:
        Busy: it names the command.
    """
    with _rwlock() as table:
        for info in _infos(table):
            if info["pid"] != os.getpid():
                raise Busy(f"(PID {info['pid']}): {_short(info['cmd'])}")


def insist(
    attempt: Callable[[], Result],
    show: Callable[[str], None],
    rest: Callable[[float], object] = time.sleep,
) -> Result:
    """Return the result of `attempt`; retry it with growing pauses while it raises `Busy`.

    Raises:
        RuntimeError: it waits for this process itself, which would never end.
    """
    pause = 0.5
    while True:
        try:
            return attempt()
        except Busy as busy:
            blocker = re.search(r"\(PID \d+\): .*", str(busy))
            if f"(PID {os.getpid()})" in str(busy):
                raise RuntimeError(
                    "this run keeps others out of the folder and asks DVC about it; call release() first."
                ) from None
        if pause == 0.5:
            show(f"waits for {blocker[0] if blocker else 'another DVC command'}")
        rest(pause)
        pause = min(2 * pause, 10)
        with _rwlock():  # forgets those who ended
            pass


def _wait_for_flow(file: IO[str]) -> None:
    """Take the flow's lock, and note in its file who has it."""
    waits = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if not waits:
                file.seek(0)
                console.print(f"another run works here {file.read().strip()}; waiting", markup=False)
            waits = True
            time.sleep(0.3)
    file.truncate(0)
    file.write(f"since {datetime.now():%H:%M} (pid {os.getpid()})\n")
    file.flush()


def _when_idle(act: Callable[[str, dict[str, Any]], object]) -> None:
    """Wait until no DVC command works here, then `act(root, table)` while none can begin.

    DVC holds its own lock except while a stage's command runs, and then it is in the table.
    """
    from dvc.repo import Repo

    pause, waits = 0.5, False
    while True:
        repo = Repo(_wait_for_lock=True)
        with repo.lock, _rwlock() as table:
            others = [info for info in _infos(table) if info["pid"] != os.getpid()]
            if not others:
                act(repo.root_dir, table)
                return
        if not waits:
            commands = ", ".join(sorted({f"{_short(info['cmd'])} (pid {info['pid']})" for info in others}))
            console.print(f"{commands} works here; waiting until it has ended", markup=False, soft_wrap=True)
        waits = True
        time.sleep(pause)
        pause = min(2 * pause, 5)


@contextlib.contextmanager
def _rwlock() -> Iterator[dict[str, Any]]:
    """Yield DVC's table of who reads and writes which path, to change, without those who have ended.

    A table that a kill or a full disk cut off counts as empty: nobody can read who was in it, DVC neither.
    """
    from dvc.lock import make_lock
    from dvc.repo import Repo

    hardlink = Repo().config["core"].get("hardlink_lock", False)
    with make_lock(f"{_RWLOCK}.lock", tmp_dir=str(DVC_TMP), hardlink_lock=hardlink, wait=True):
        before = _RWLOCK.read_text() if _RWLOCK.exists() else "{}"
        try:
            table = _living(json.loads(before))
        except (ValueError, AttributeError, KeyError, TypeError):
            table = {"write": {}, "read": {}}
        yield table
        after = json.dumps(table)
        if after != before:
            write_text(_RWLOCK, after)


def _living(entries: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of living processes."""
    written = _RWLOCK.stat().st_mtime if _RWLOCK.exists() else 0.0
    write = {path: info for path, info in entries.get("write", {}).items() if _lives(info, written)}
    read = {
        path: [info for info in infos if _lives(info, written)]
        for path, infos in entries.get("read", {}).items()
    }
    return {"write": write, "read": {path: infos for path, infos in read.items() if infos}}


def _lives(info: dict[str, Any], written: float) -> bool:
    """Tell whether the process of an entry lives, and its id has not passed to another."""
    try:
        process = psutil.Process(info["pid"])
        if process.status() == psutil.STATUS_ZOMBIE or process.create_time() > written + 1:
            return False
        return "dvc" not in info["cmd"] or any("dvc" in word for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _infos(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [*table["write"].values(), *(info for infos in table["read"].values() for info in infos)]


def release() -> None:
    """Take this process out of DVC's table, so that DVC reads `stages` again."""
    with _rwlock() as table:
        mine = [path for path, info in table["write"].items() if info["pid"] == os.getpid()]
        for path in mine:
            del table["write"][path]


def _end_orphans(root: str, table: dict[str, Any]) -> None:
    """End the stages of a `dvc repro` that was killed, as nobody would lock what they make.

    DVC names the project and the stage in the environment of every command.
    """
    stages = orphans(root)
    processes = [process for each in stages.values() for process in each]
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    for stage in stages:
        console.print(f"{stage} | stopped: left over from a killed run", markup=False)
    _, stubborn = psutil.wait_procs(processes, GRACE)
    for process in stubborn:
        process.kill()


def orphans(root: str) -> dict[str, list[psutil.Process]]:
    """Return the processes of the stages of the project `root`, by stage; not this one and its parents."""
    own = psutil.Process()
    spared = {own.pid, *(parent.pid for parent in own.parents())}
    stages: dict[str, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if (
                environment.get("DVC_ROOT") == root
                and "DVC_STAGE" in environment
                and process.pid not in spared
            ):
                stages.setdefault(environment["DVC_STAGE"], []).append(process)
    return stages


def busy() -> bool:
    """Tell whether a run or a DVC command works here."""
    if not DVC_TMP.is_dir():
        return False
    with _HELD.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    with _rwlock() as table:
        return bool(_infos(table))


def _me() -> dict[str, Any]:
    return {"pid": os.getpid(), "cmd": _short(" ".join(sys.argv))}


def _short(command: str) -> str:
    """Return a command without the folder and the module of its program."""
    return re.sub(r"^\S*/(\w+)/__main__\.py|^\S*/", lambda path: path[1] or "", command)
