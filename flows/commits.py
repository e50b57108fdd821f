"""A run as a commit: params, code and dvc.lock together, made in a clone that nobody edits.

A scheduled or spread run works in a clone of its own, the folder that PRUNEQUANT_CLONE names on the machine
where it runs. It checks a source out there, `main` for example, and ends with a commit on its branch: the
source's files with the run's dvc.lock. The first parent is the run before, so `night~1` is the last night;
the second is the source. A run that failed is a commit as well, with the failure in its message. HEAD is
detached all the time, so no branch that a person works on ever moves.

A run begins with the lock of the run before, so an unchanged night runs nothing. Where the source's own lock
has changed since then, the source is right.
"""

import os
import subprocess
import tempfile
import threading
import uuid
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table

from flows import lockfile
from flows.graph import DVC
from flows.terminal import console
from flows.workspace import BUSY, Busy, insist
from stages.core.errors import Refusal
from stages.job.provenance import LOCK

CLONE = "PRUNEQUANT_CLONE"
"""Names the clone that runs may use."""
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
        self._lock_text = ""
        self._guard = threading.Lock()

    def begin(self, source: str) -> None:
        """Check the source out, with the lock of the last run; bring its data into the folder.

        Args:
            source: a branch, tag or commit; of a branch, the remote's.

        Raises:
            Refusal: the clone holds edits, or has no such source.
        """
        self.source = _prepared(source)
        cut_off = _known(f"refs/remotes/origin/{self._running}")
        self.id = (cut_off and _trailer(cut_off, "Run-Id")) or uuid.uuid4().hex
        self._lock_text = self._memo()
        start = _commit(self.source, self._lock_text, (self.source,), f"{self.name}: begins")
        _put_in_place(start)
        dvc("fetch", ok=False)  # what no remote has is computed
        dvc("checkout", "--force", "--allow-missing")

    def publish(self) -> str:
        """Push the files of this run, with dvc.lock as it is now, for workers; return the commit."""
        with self._guard:
            text = LOCK.read_text()
            if text != self._lock_text or not self._published:
                message = f"{self.name}: running\n\nRun-Id: {self.id}\nRun-Source: {self.source}"
                commit = _commit(self.source, text, (self._published or self.source,), message)
                git("push", "--quiet", "--force", "origin", f"{commit}:refs/heads/{self._running}")
                self._published, self._lock_text = commit, text
            return self._published

    def end(self, state: str, message: str) -> bool:
        """Commit the run on its branch; return whether there is a run before it.

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
        git("update-ref", f"refs/heads/{self.name}", commit)
        _put_in_place(commit)
        return bool(tip)

    def push(self) -> None:
        """Send the branch and its results to the remotes."""
        git("push", "--quiet", "origin", f"refs/heads/{self.name}")
        dvc("push")

    def clear(self) -> None:
        """Delete the branch that workers followed, now that the run is committed."""
        if self._published or _known(f"origin/{self._running}"):
            git("push", "--quiet", "origin", "--delete", self._running)

    @property
    def _running(self) -> str:
        return f"running/{self.name}"

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
    return sorted(found, key=lambda run: run.when, reverse=True)


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


def git(*arguments: str, **variables: str) -> str:
    """Run git here and return what it printed.

    Raises:
        Refusal: git failed.
    """
    command = ["git", *_AUTHOR, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Refusal(f"git {arguments[0]} failed in {Path.cwd()}: {reason}")
    return done.stdout.rstrip("\n")


def dvc(*arguments: str, ok: bool = True) -> None:
    """Run DVC here; wait for what blocks it.

    Args:
        ok: whether a failure is an error.

    Raises:
        Refusal: DVC failed.
    """
    command = [*DVC, *arguments]
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}

    def attempt() -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode and BUSY.search(f"{done.stdout}{done.stderr}"):
            raise Busy(f"{done.stdout}{done.stderr}")
        return done

    done = insist(attempt, console.print)
    if done.returncode and ok:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = errors[0].removeprefix("ERROR: ") if errors else done.stderr.strip()[-500:]
        raise Refusal(f"dvc {' '.join(arguments)} failed in {Path.cwd()}: {reason}")


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
    return git("commit-tree", tree, *options, "-m", message)


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
