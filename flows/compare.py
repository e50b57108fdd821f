"""The flow: bring every stale stage of DVC's graph up to date, as many side by side as there are cores.

DVC decides which stages must run and keeps their results; Prefect runs them. A stage is a task that waits for
the tasks it depends on and then calls `dvc repro --single-item`. If a stage fails, all that depend on it are
skipped and the others still run; then the flow fails and says which stage failed and why. `dvc repro` alone
does the same work, a stage at a time.
"""

import os
import signal

os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault(
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180"
)  # it creates a database first

from collections.abc import Callable
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import wait
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from flows import summary, workspace
from flows.plan import Plan, plan
from flows.process import Children, end_with_this
from flows.terminal import console
from stages.core import disk
from stages.core.errors import Refusal

# A task that waits for its upstream holds a thread, so there are many threads; `jobs` limits how many stages
# run at a time. Tasks are submitted upstream first, so waits are never circular.
THREADS = 256


def start_server() -> None:
    """Start Prefect's temporary server, which ignores ctrl-C, unless a server is configured.

    A terminal sends ctrl-C to every process of its group. If the server stopped with the others, the flow
    would wait long before it could report how it ended. The server stops when this process exits.
    """
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value():
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit it
    server = SubprocessASGIServer()
    try:
        server.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if server.server_process:
        end_with_this(server.server_process.pid)


@flow(name="compare", task_runner=ThreadPoolTaskRunner(max_workers=THREADS))  # type: ignore[arg-type]
def compare(jobs: int | None = None, targets: list[str] | None = None) -> State[Any]:
    """Bring the project in the current folder up to date.

    Args:
        jobs: stages side by side; None: as many as the cores allow, 1 on a GPU.
        targets: stages or artifacts to make, with all they need; None or empty: everything.
    """
    return _bring_up_to_date(jobs, targets or [], advance_all)


def compare_here(jobs: int | None, targets: list[str]) -> State[Any]:
    """Do the same as the flow `compare`, and start no server if nothing is stale."""

    def advance(run: Plan) -> State[Any]:
        if not run.todo:
            return conclude(run)
        start_server()

        @flow(name="compare", task_runner=ThreadPoolTaskRunner(max_workers=THREADS))  # type: ignore[arg-type]
        def planned() -> State[Any]:
            return advance_all(run)

        state: State[Any] = planned(return_state=True)
        return state

    return _bring_up_to_date(jobs, targets, advance)


def _bring_up_to_date(
    jobs: int | None, targets: list[str], advance: Callable[[Plan], State[Any]]
) -> State[Any]:
    """Plan, then advance, alone in the workspace."""

    def work() -> State[Any]:
        with workspace.alone() as held:
            return plan_and_advance(Children(held), jobs, targets, advance)

    return mendable(work)


def plan_and_advance(
    children: Children, jobs: int | None, targets: list[str], advance: Callable[[Plan], State[Any]]
) -> State[Any]:
    """Plan, then advance, in a workspace that `workspace.alone` holds."""
    run = plan(jobs, targets, children)
    if "code" not in run.todo:
        workspace.claim()
    return advance(run)


def mendable(work: Callable[[], State[Any]]) -> State[Any]:
    """Do the work; turn what the user can mend into a failed state."""
    try:
        return work()
    except Refusal as refusal:
        return Failed(message=str(refusal))
    except Exception as error:
        if not disk.is_full(error):
            raise
        return Failed(message=disk.full())


def advance_all(run: Plan) -> State[Any]:
    """Run what the plan says as Prefect's tasks, and say how it ended."""

    @task(name="stage", task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
    def stage(name: str) -> Any:
        outcome = run.advance(name)
        message = f"{outcome.state} in {outcome.seconds:.1f} s"
        get_run_logger().info("%s: %s", name, message)
        if outcome.state in ("failed", "skipped"):
            return Failed(message=outcome.reason)
        return Completed(name=outcome.state.capitalize(), message=message)

    futures: dict[str, Any] = {}
    try:
        for name in run.todo:
            before = [futures[up] for up in run.graph[name].upstream if up in futures]
            futures[name] = stage.submit(name, wait_for=before, return_state=False)
        wait(list(futures.values()))
    except BaseException:
        console.print("stopping: running stages are ended, no other starts")
        run.children.stop()
        raise
    finally:
        run.lock.sort()
    run.children.gather()
    outcomes = run.outcomes()
    create_table_artifact(
        key="compare", table=summary.outcome_rows(outcomes), description=summary.totals(outcomes)
    )
    get_run_logger().info(summary.totals(outcomes))
    return conclude(run)


def conclude(run: Plan) -> State[Any]:
    """Show how every stage ended and where the report is; return the state of the whole run."""
    outcomes = run.outcomes()
    summary.show_outcomes(outcomes)
    if summary.is_current(outcomes):
        summary.show_report()
    if reasons := {outcome.reason for outcome in outcomes if outcome.state == "skipped" and outcome.reason}:
        return Failed(message="; ".join(sorted(reasons)))
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if failed:
        return Failed(message=summary.blame(failed))
    return Completed(message=summary.totals(outcomes))
