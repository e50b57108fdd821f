"""The flow: bring every stale stage of DVC's graph up to date, as many side by side as the machine can hold.

DVC decides which stages must run and keeps their results; Prefect runs them. A stage is a task that waits for
the tasks it depends on and then calls `dvc repro --single-item`. If a stage fails, all that depend on it are
skipped and the others still run; then the flow fails and says which stage failed and why. `dvc repro` alone
does the same work, a stage at a time.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any
from uuid import UUID

from prefect import allow_failure, flow, task
from prefect.artifacts import (
    create_link_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.futures import wait
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from flows import scores, server, summary
from flows.plan import Plan
from flows.retries import TRIES
from flows.server import WITHOUT
from flows.terminal import console
from flows.update import Ending
from stages.core import disk
from stages.core.errors import Refusal
from stages.core.files import REPORT

# A task that waits for its upstream holds a thread, so there are many threads; `flows.resources` limits how
# many stages run at a time. Tasks are submitted upstream first, so waits are never circular.
THREADS = 256


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


def state_of(ending: Ending) -> State[Any]:
    """Return how a run ended as Prefect says it."""
    return Completed(message=ending.message) if ending.ok else Failed(message=ending.message)


def advance_on_a_server(run: Plan) -> None:
    """Run what the plan says in a flow of its own, on a temporary server unless one is configured.

    Raises:
        Refusal: there is no server.
    """

    @flow(name="compare", task_runner=ThreadPoolTaskRunner(max_workers=THREADS))  # type: ignore[arg-type]
    def planned() -> State[Any]:
        advance_all(run)
        return Completed()

    ended = threading.Event()

    def end() -> None:
        if ended.is_set():
            return
        try:
            with contextlib.suppress(OSError):  # the terminal is closed
                console.print(
                    f"Prefect's temporary server has died; finished stages are kept. Run again, {WITHOUT}.",
                    soft_wrap=True,
                )
            run.stop()
            run.lock.sort()
            console.show_cursor()
        finally:  # a full disk, for example
            os._exit(1)  # the flow would wait for the server for minutes

    server.start(end)
    planned(return_state=True).result()
    ended.set()


def advance_all(run: Plan) -> None:
    """Run what the plan says as Prefect's tasks."""

    def due(_: Any, task_run: TaskRun, __: Any) -> bool:
        return run.retries.due(task_run.name)

    @task(
        name="stage", task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False,
        retries=TRIES, retry_condition_fn=due, retry_delay_seconds=0,
    )  # fmt: skip
    def stage(name: str) -> Any:
        try:
            outcome = run.advance(name)
        except InterruptedError:
            return Cancelled(message="the run was stopped")
        except Exception as error:
            get_run_logger().exception("%s: an unexpected error", name)
            outcome = run.fail(name, error)
        message = f"{outcome.state} in {outcome.seconds:.1f} s"
        get_run_logger().info("%s: %s", name, message)
        progress.step(name)
        if outcome.state in ("failed", "skipped"):
            return Failed(message=outcome.reason)
        return Completed(name=outcome.state.capitalize(), message=message)

    run.listen = lambda line: get_run_logger().info(line)
    progress = _Progress(len(run.todo))
    futures: dict[str, Any] = {}
    measures = False
    try:
        for name in run.todo:
            upstream = run.graph[name].upstream
            before = [futures[up] for up in upstream if up in futures]
            measures = measures or run.graph[name].alone
            if measures:  # it, and what comes after it, waits for all before, however they end
                before += [allow_failure(futures[other]) for other in futures if other not in upstream]
            futures[name] = stage.submit(name, wait_for=before, return_state=False)
        wait(list(futures.values()))
    except BaseException:
        console.print("stopping: running stages are ended, no other starts")
        run.stop()
        raise
    finally:
        run.lock.sort()
    run.children.gather()
    _publish(run)


class _Progress:
    """The share of stages that have ended, as an artifact that the UI draws."""

    def __init__(self, stages: int) -> None:
        self._stages = stages
        self._ended: set[str] = set()
        self._lock = threading.Lock()
        self._artifact: UUID = create_progress_artifact(0.0, "progress", f"of {stages} stages")  # type: ignore[assignment]

    def step(self, stage: str) -> None:
        """Count a stage, once even if it runs again."""
        with self._lock:
            self._ended.add(stage)
            try:
                update_progress_artifact(self._artifact, 100 * len(self._ended) / self._stages)
            except Exception as error:  # a picture, which no stage may fail for
                get_run_logger().warning("Prefect did not take the progress: %s", error)


def _publish(run: Plan) -> None:
    """Write artifacts that the UI shows: how stages ended, the results, a link to the report."""
    outcomes = run.outcomes()
    totals = summary.totals(outcomes)
    create_table_artifact(key="compare", table=summary.outcome_rows(outcomes), description=totals)
    if summary.is_current(outcomes):
        create_table_artifact(key="results", table=scores.readable(scores.summarized()))
        create_link_artifact(key="report", link=(REPORT / "index.html").resolve().as_uri())
    get_run_logger().info(totals)
