"""A run as a commit: params, code and dvc.lock together, made in a clone that nobody edits.

A scheduled or spread run works in a clone of its own, the folder that PRUNEQUANT_CLONE names on the machine
where it runs. It checks a source out there, `main` for example, and ends with a commit on its branch: the
source's files with the run's dvc.lock. The commit is tagged `<branch>/<time in UTC>`. Its first parent is the
run before, so `night~1` is the last night; the second is the source. A run that failed is a commit as well,
with the failure in its message. HEAD is always detached, so no branch that a person works on ever moves.

A run begins with the lock of the run before, so an unchanged night runs nothing. Where the source's own lock
has changed since then, the source is right.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import psutil
from rich import box
from rich.markup import escape
from rich.table import Table

from flows import lockfile
from flows.graph import DVC
from flows.process import run_guarded
from flows.terminal import console
from flows.workspace import BUSY, Busy, insist
from stages.core.errors import Refusal
from stages.job import provenance
from stages.job.locked import LOCK, locked_stages

CLONE = "PRUNEQUANT_CLONE"
"""Names the clone that runs may use."""
_FLOW_RUN = "PREFECT__FLOW_RUN_ID"
"""Prefect sets it in the process that a worker starts."""
_RENEWED = "PRUNEQUANT_RENEWED"
"""When a worker's process started again."""
_PAUSES = (5.0, 20.0, 60.0)
"""Seconds before DVC is tried again after a failure of the network."""
_NETWORK = re.compile(
    r"connect|timed? ?out|reset by peer|SlowDown|name resolution|temporar|\b50[0-9]\b", re.I
)
_AUTHOR = ("-c", "user.name=prunequant", "-c", "user.email=prunequant@localhost")


class PastRun(NamedTuple):
    """One commit of a branch of runs."""

    revision: str
    """A name that git and `prunequant diff` know, such as night~1."""
    when: str
    state: str
    """How it ended, in Prefect's words."""
    source: str
    summary: str


class Branch:
    """The runs of one deployment, in the clone that is the current folder.

    Attributes:
        source: the commit whose files are run.
        id: of the run; a spread run that follows one that was cut off has the same.
    """

    def __init__(self, name: str) -> None:
        """Take the branch of this name, which need not exist yet."""
        self.name = name
        self.source = ""
        self.id = ""
        self._published = ""
        self._cut_off = ""
        self._tag = ""
        self._lock_text = ""
        self._guard = threading.Lock()

    def begin(self, source: str) -> None:
        """Check the source out, with the lock of the last run; bring its data into the folder.

        Args:
            source: a branch, tag or commit; of a branch, the remote's.

        Raises:
            Refusal: the clone holds edits or has no such source, or the branch is not one of runs.
        """
        self._refuse_other()
        self.source = _prepared(source)
        self._refuse_other()  # of the remote, as it is now
        cut_off = self._cut_off = _known(f"refs/remotes/origin/{self._running}")
        self.id = (cut_off and _trailer(cut_off, "Run-Id")) or uuid.uuid4().hex
        self._lock_text = self._memo()
        start = _commit(self.source, self._lock_text, (self.source,), f"{self.name}: begins")
        _put_in_place(start)
        dvc("fetch", ok=False)  # anything the remote lacks is recomputed
        dvc("checkout", "--force", "--allow-missing")

    def publish(self) -> str:
        """Push the files of this run, with dvc.lock as it is now, for workers; return the commit.

        Raises:
            Refusal: another run of the branch has begun since.
        """
        with self._guard:
            text = LOCK.read_text()
            if text != self._lock_text or not self._published:
                message = f"{self.name}: running\n\nRun-Id: {self.id}\nRun-Source: {self.source}"
                last = self._published or self._cut_off
                commit = _commit(self.source, text, (last or self.source,), message)
                self._move_running(last, commit)
                self._published, self._lock_text = commit, text
            return self._published

    def end(self, state: str, message: str) -> bool:
        """Commit the run on its branch and tag it; return whether there is a run before it.

        Args:
            state: how it ended, in Prefect's words.
            message: the totals, or why it failed.
        """
        tip = self._tip()
        first, _, rest = message.strip().partition("\n")
        body = f"{self.name}: {first or state}\n\n{rest}\n\nRun-State: {state}\nRun-Source: {self.source}"
        text = LOCK.read_text() if LOCK.exists() else ""
        parents = (tip, self.source) if tip else (self.source,)
        commit = _commit(self.source, text, parents, body)
        self._set(commit)
        _put_in_place(commit)
        return bool(tip)

    def refuse(self, reason: str) -> None:
        """Commit a run that could not begin, with the files of the run before, or else of the clone.

        The clone's own files stay as they are: they may hold the edits that were refused.
        """
        self._refuse_other()
        parent = self._tip() or git("rev-parse", "HEAD")
        message = f"{self.name}: {reason}\n\nRun-State: Failed\nRun-Source: {parent}"
        self._set(git("commit-tree", f"{parent}^{{tree}}", "-p", parent, "-F", "-", stdin=message))

    def push(self) -> None:
        """Send the branch, the run's tag and its results to the remotes.

        Raises:
            Refusal: a result was computed from other inputs than dvc.lock lists.
        """
        if wrong := provenance.disagreements(locked_stages()):
            raise Refusal(f"{', '.join(wrong)} disagree with dvc.lock, so nothing is pushed; run it again.")
        git("push", "--quiet", "origin", f"refs/heads/{self.name}", self._tag)
        dvc("push")

    def clear(self) -> None:
        """Delete the branch that workers followed, now that the run is committed."""
        if last := self._published or self._cut_off:
            with contextlib.suppress(Refusal):  # it is another run's by now, or the next run's to go on with
                self._move_running(last, "")

    @property
    def _running(self) -> str:
        return f"running/{self.name}"

    def _set(self, commit: str) -> None:
        """Move the branch to the commit of this run, and tag it."""
        git("update-ref", f"refs/heads/{self.name}", commit)
        self._tag = f"refs/tags/{self.name}/{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}"
        git("update-ref", self._tag, commit)

    def _move_running(self, last: str, commit: str) -> None:
        """Move the branch that workers follow, unless another run has moved it meanwhile.

        Args:
            last: where this run left it; nothing: it does not exist.
            commit: nothing: delete it.
        """
        path = f"refs/heads/{self._running}"
        try:
            git("push", "--quiet", f"--force-with-lease={path}:{last}", "origin", f"{commit}:{path}")
        except Refusal as refusal:
            if "stale info" not in str(refusal):
                raise
            raise Refusal(
                f"another run of branch {self.name} has begun and goes on with what this run finished; "
                "start one at a time, or give each a branch of its own."
            ) from None

    def _refuse_other(self) -> None:
        """Refuse a branch that holds no runs, as the commits of runs do not belong there."""
        command = ["git", "check-ref-format", "--branch", self.name]
        if subprocess.run(command, capture_output=True).returncode:
            raise Refusal(f"{self.name!r} is no name for a git branch; give one such as night.")
        for place in ("refs/heads", "refs/remotes/origin"):
            tip = _known(f"{place}/{self.name}")
            if tip and not _trailer(tip, "Run-State"):
                raise Refusal(
                    f"branch {self.name} holds other commits than runs; give a new name, such as night."
                )

    def _tip(self) -> str:
        """Return the last run's commit: the clone's own, or the remote's if that is further."""
        own, other = _known(f"refs/heads/{self.name}"), _known(f"refs/remotes/origin/{self.name}")
        return other if other and (not own or _is_ancestor(own, other)) else own

    def _memo(self) -> str:
        """Return the lock to begin with, an entry at a time: the last run's, unless the source changed it.

        The last run is one that was cut off, if its workers' branch is still there.
        """
        theirs = _blocks_at(self.source)
        last = _known(f"refs/remotes/origin/{self._running}") or self._tip()
        if not last:
            return lockfile.joined(theirs) if theirs else ""
        ours, base = _blocks_at(last), _blocks_at(_trailer(last, "Run-Source"))
        kept = {name: text for name, text in ours.items() if theirs.get(name) in (None, base.get(name))}
        return lockfile.joined({**theirs, **kept})


def check_out(commit: str) -> None:
    """Put the files of a commit and the results that the cache has of it into the clone.

    Raises:
        Refusal: the clone holds edits, or has no such commit.
    """
    _put_in_place(_prepared(commit))
    dvc("checkout", "--force", "--allow-missing")


def renew() -> None:
    """Start a worker's process again if a checkout has changed code that it has loaded.

    A worker loads the flow from its clone before the flow checks the run's commit out, so without this a run
    would plan with the code of the run before. Prefect goes on with the same flow run.
    """
    began = float(os.environ.get(_RENEWED, 0)) or psutil.Process().create_time()
    ours = [
        module for name, module in list(sys.modules.items()) if name.partition(".")[0] in ("flows", "stages")
    ]
    loaded = [Path(module.__file__) for module in ours if module.__file__]
    if _FLOW_RUN in os.environ and any(not file.exists() or file.stat().st_mtime > began for file in loaded):
        console.print("the code has changed; the run starts again with it")
        os.environ[_RENEWED] = repr(time.time())
        os.execv(sys.executable, sys.orig_argv)


def enter_clone() -> None:
    """Go to the clone that runs may use.

    Raises:
        Refusal: PRUNEQUANT_CLONE names none, or the folder that the user is in.
    """
    clone = Path(os.environ.get(CLONE, ""))
    if not os.environ.get(CLONE) or not (clone / ".git").exists() or clone.resolve() == Path.cwd():
        raise Refusal(
            f"{CLONE} is {os.environ.get(CLONE, 'not set')!r}; set it to a clone of this project that nobody "
            "edits, as the run checks a commit out there: git clone . ../runs && export "
            f"{CLONE}=$(realpath ../runs)"
        )
    os.chdir(clone)


def committed_head() -> str:
    """Return the commit that the current folder is at.

    Raises:
        Refusal: the folder holds edits.
    """
    if dirt := _dirt():
        raise Refusal(
            f"{', '.join(dirt)} changed and not committed, and workers compute what is committed; run `git "
            "commit` first."
        )
    return git("rev-parse", "HEAD")


def runs(branch: str | None = None) -> list[PastRun]:
    """Return the runs on one branch, or on every branch of runs here and at the remote, latest first.

    Raises:
        Refusal: there is no such branch, or no run is on it.
    """
    names = git("for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/remotes").split("\n")
    wanted = [name for name in names if name and branch in (None, name, name.removeprefix("origin/"))]
    if branch in wanted:
        wanted = [branch]
    found = [run for name in wanted if not name.endswith("/HEAD") for run in _runs_on(name)]
    if not found:
        where = f"no run is on branch {branch!r}" if branch else "no branch here holds runs"
        raise Refusal(f"{where}; `git fetch <clone or remote> night:night` brings those of a deployment.")
    return sorted(found, key=lambda run: datetime.fromisoformat(run.when), reverse=True)


def run_table(listed: list[PastRun]) -> Table:
    """Return runs as a table."""
    table = Table("run", "when", "ended", "source", "summary", box=box.SIMPLE)
    for run in listed:
        table.add_row(*map(escape, run))
    return table


def _runs_on(branch: str) -> list[PastRun]:
    state, source = (f"%(trailers:key={key},valueonly,separator=)" for key in ("Run-State", "Run-Source"))
    fields = f"--format=%cI%x00{state}%x00{source}%x00%s"
    # Messages are people's: other characters that splitlines takes for the end of a line may be in one.
    lines = git("log", "--first-parent", fields, branch, "--").split("\n")
    rows = [line.split("\0") for line in lines]
    listed = []
    for back, (when, ended, start, subject) in enumerate(rows):
        if not ended:
            break
        summary = subject.partition(": ")[2]
        listed.append(PastRun(f"{branch}~{back}" if back else branch, when, ended, start[:10], summary))
    return listed


def git(*arguments: str, stdin: str | None = None, **variables: str) -> str:
    """Run git here and return what it printed.

    Raises:
        Refusal: git failed.
    """
    command = ["git", *_AUTHOR, *arguments]
    environment = {**os.environ, "LC_ALL": "C", **variables}
    done = subprocess.run(command, capture_output=True, text=True, input=stdin, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        reason = next((line for line in lines if "[rejected]" in line), lines[-1])
        raise Refusal(f"git {arguments[0]} failed in {Path.cwd()}: {reason}")
    return done.stdout.rstrip("\n")


def dvc(*arguments: str, ok: bool = True, stopped: threading.Event | None = None) -> None:
    """Run DVC here; wait for what blocks it, and try again what the network failed.

    Args:
        ok: whether a failure is an error; otherwise it is only shown.
        stopped: ends it when it is set.

    Raises:
        InterruptedError: it was stopped.
        Refusal: DVC failed.
    """
    stopped = stopped or threading.Event()

    def attempt() -> subprocess.CompletedProcess[str]:
        done = run_guarded([*DVC, *arguments], stopped)
        if done.returncode and BUSY.search(done.stdout):
            raise Busy(done.stdout)
        return done

    for pause in (*_PAUSES, None):
        done = insist(attempt, console.print, stopped.wait)
        if not done.returncode:
            return
        lines = done.stdout.strip().splitlines()
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        reason = (
            f"dvc {' '.join(arguments)} failed in {Path.cwd()}: {(errors or lines or ['no reason given'])[0]}"
        )
        if pause is None or not _NETWORK.search(done.stdout):
            break
        console.print(f"{reason}; again in {pause:.0f} s", markup=False, soft_wrap=True)
        stopped.wait(pause)
    if ok:
        raise Refusal(reason)
    console.print(reason, markup=False, soft_wrap=True)


def _prepared(source: str) -> str:
    """Refuse a clone with edits, fetch, and return the commit of a source."""
    if dirt := _dirt():
        raise Refusal(
            f"{Path.cwd()} holds edits ({', '.join(dirt)}), but a run needs a clone that nobody edits; move "
            "them to another clone, or out of the way with `git stash --include-untracked`."
        )
    if "origin" in git("remote").splitlines():
        git("fetch", "--quiet", "--prune", "origin")
    if commit := _known(f"refs/remotes/origin/{source}") or _known(source):
        return commit
    raise Refusal(
        f"{Path.cwd()} has no branch, tag or commit {source!r}, not even after `git fetch origin`; push it "
        "to that clone's origin."
    )


def _dirt() -> list[str]:
    """Return edited and new files.

    Not dvc.lock: a killed run leaves it changed, and what it named is in DVC's cache.
    """
    status = git("status", "--porcelain", "--untracked-files=all", "--no-renames", "-z", ".")
    paths = [line[3:] for line in status.split("\0") if line]
    prefix = git("rev-parse", "--show-prefix")
    return [path for path in paths if path != f"{prefix}{LOCK}"]


def _commit(source: str, lock: str, parents: tuple[str, ...], message: str) -> str:
    """Commit the files of a source with another dvc.lock; no branch, index or file changes."""
    with tempfile.TemporaryDirectory() as folder:
        index, text = str(Path(folder, "index")), Path(folder, "lock")
        text.write_text(lock)
        git("read-tree", source, GIT_INDEX_FILE=index)
        if lock:
            blob = git("hash-object", "-w", str(text))
            path = git("rev-parse", "--show-prefix") + str(LOCK)
            git("update-index", "--add", "--cacheinfo", f"100644,{blob},{path}", GIT_INDEX_FILE=index)
        tree = git("write-tree", GIT_INDEX_FILE=index)
    options = [word for parent in parents for word in ("-p", parent)]
    return git("commit-tree", tree, *options, "-F", "-", stdin=message)


def _put_in_place(commit: str) -> None:
    git("checkout", "--quiet", "--force", "--detach", commit)


def _known(name: str) -> str:
    """Return the commit of a name; nothing if there is none."""
    command = ["git", "rev-parse", "--quiet", "--verify", "--end-of-options", f"{name}^{{commit}}"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _is_ancestor(old: str, new: str) -> bool:
    return subprocess.run(["git", "merge-base", "--is-ancestor", old, new]).returncode == 0


def _trailer(commit: str, key: str) -> str:
    return git("log", "-1", f"--format=%(trailers:key={key},valueonly,separator=)", commit)


def _blocks_at(commit: str) -> dict[str, str]:
    """Return the text of each entry of a commit's dvc.lock."""
    command = ["git", "show", f"{commit}:./{LOCK}"]
    shown = subprocess.run(command, capture_output=True, text=True)
    return {} if shown.returncode else lockfile.entry_texts(shown.stdout)
