"""The flow of nights and weeks, and of spread runs: a run whose end is a commit.

It is `compare` in a clone that nobody edits (see `flows.commits`). However the run ends, its branch gets a
commit that says so. A page tells what has changed since the run before, from the same diff as
`prunequant diff night~1 night`: as an artifact in Prefect, and in `data/runs/since-night.html` of the clone.
"""

import io
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_API_URL
from prefect.states import State
from prefect.task_runners import ThreadPoolTaskRunner
from rich.console import Console

from flows import commits, doctor, graph, workspace
from flows.changes.asked import compare
from flows.changes.show import show_diff
from flows.changes.webpage import write_changes
from flows.commits import Branch
from flows.compare import THREADS, advance_all, mendable, state_of
from flows.process import Children
from flows.spread import Workers
from flows.update import Ending, plan_and_advance
from stages.core.errors import Refusal

_KEY = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")
"""Letters that a key of Prefect's artifacts may have, beside dashes."""
ON_WORKERS = "spread"
"""The branch of runs that `prunequant run --spread` starts."""


@flow(name="scheduled", task_runner=ThreadPoolTaskRunner(max_workers=THREADS))  # type: ignore[arg-type]
def scheduled(
    branch: str,
    source: str = "main",
    targets: list[str] | None = None,
    jobs: int | None = None,
    spread: bool = False,
    push: bool = False,
) -> State[Any]:
    """Bring a source up to date in the clone that is the current folder; commit the run on a branch.

    Args:
        branch: each run is a commit on it, such as `night`.
        source: a branch, tag or commit, whose params and code are run.
        targets: stages or artifacts to make, with all they need; None or empty: everything.
        jobs: stages side by side at most; None: as many as have room; spread: no limit.
        spread: whether the workers of Prefect's pools compute the stages.
        push: whether the branch goes to the git remote and the results to the DVC remote.
    """
    runs = Branch(branch)

    def work() -> State[Any]:
        with workspace.alone() as held:
            try:
                runs.begin(source)
                commits.renew()
                if other := doctor.other_versions():
                    raise Refusal(f"{other}: run `pip install -r requirements.lock` in {Path.cwd()}.")
            except Refusal as refusal:
                runs.refuse(str(refusal))
                raise
            try:
                state = mendable(lambda: _advance(runs, held, targets or [], jobs, spread))
            except BaseException as error:
                runs.end("Stopped", f"stopped, {type(error).__name__}")
                raise
            follows = runs.end(str(state.name), str(state.message))
            if spread:
                runs.clear()
            if push:
                runs.push()
            if follows:
                workspace.release()  # the run is over, and what changed is asked of DVC
                _tell_changes(branch)
            return state

    return mendable(work)


def spread_from_here(targets: list[str], jobs: int | None) -> Ending:
    """Run the commit that the current folder is at on the workers; the run is a commit on branch `spread`.

    Raises:
        Refusal: the folder holds edits, there is no clone for the run, or no server is configured.
    """
    if not PREFECT_API_URL.value():
        raise Refusal(
            "--spread needs the Prefect server that the workers ask; set PREFECT_API_URL to its address, "
            "such as http://127.0.0.1:4200/api, or drop --spread."
        )
    source = commits.committed_head()
    commits.enter_clone()
    state: State[Any] = scheduled(ON_WORKERS, source, targets, jobs, spread=True, return_state=True)
    return Ending(state.is_completed(), str(state.message))


def _advance(
    runs: Branch, held: tuple[int, ...], targets: list[str], jobs: int | None, spread: bool
) -> State[Any]:
    """Do the run; after a spread one nothing may be left to do in the clone."""
    if not spread:
        return state_of(plan_and_advance(Children(held), jobs, targets, advance_all))
    ending = plan_and_advance(Workers(held, runs), jobs or THREADS, targets, advance_all)
    workspace.release()
    left = graph.consult(lambda project: project.stale() & set(graph.select(project.graph(), targets)))
    if ending.ok and left:
        raise Refusal(
            f"{', '.join(sorted(left))} still differ from dvc.lock with the workers' results; run it again."
        )
    return state_of(ending)


def _tell_changes(branch: str) -> None:
    """Write the page of what changed since the last run, and leave it as an artifact."""
    console = Console(record=True, file=io.StringIO(), width=140)
    page = None
    try:
        diff = compare([f"{branch}~1", branch])
        show_diff(diff, console)
        stale = graph.consult(lambda project: project.stale())
        page = write_changes(diff, branch, reported="report" not in stale)
    except Exception as error:  # such as a last run whose params are of an older form
        console.print(f"what changed since {branch}~1 cannot be told: {error}", markup=False)
    text = console.export_text()
    create_markdown_artifact(
        f"```text\n{text}```\n",
        key=f"since-{''.join(letter if letter in _KEY else '-' for letter in branch.lower())}",
        description=f"`prunequant diff {branch}~1 {branch}`",
    )
    get_run_logger().info("Since the last run: %s", page.resolve() if page else text)
