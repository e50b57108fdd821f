"""One run from its plan to its last line: plan, advance what is stale, show how every stage ended.

This needs no Prefect. What advances the stages is a parameter, called only if a stage is stale, so nothing
starts a server to learn that everything is up to date.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flows import summary, workspace
from flows.plan import Outcome, Plan, plan
from flows.process import Children
from flows.watch import Watch
from stages.core import disk
from stages.core.errors import Refusal


@dataclass(frozen=True)
class Ending:
    """How a whole run ended: its totals, or why it failed."""

    ok: bool
    message: str
    stages: Sequence[Mapping[str, Any]] = ()
    """A row a stage: how it ended, its seconds, and the reason if it failed."""


def update(
    jobs: int | None, targets: list[str], advance: Callable[[Plan], None], plain: bool = True
) -> Ending:
    """Bring the project in the current folder up to date, alone in it.

    Args:
        jobs: stages side by side at most; None: as many as threads, memory and cards allow.
        targets: stages or artifacts to make, with all they need; empty: everything.
        advance: advances all of `Plan.todo`.
        plain: print lines only, also where there is a terminal to draw on.

    Raises:
        Refusal: bad params, unknown targets, or a graph that DVC cannot read; no stage but `code` has run.
    """
    from dvc.logger import set_loggers_level  # it takes a second

    try:
        with set_loggers_level(logging.CRITICAL), workspace.alone() as held:  # DVC's bars tear ours
            ending = plan_and_advance(Children(held), jobs, targets, advance, Watch(plain))
            summary.show_changes(ending.stages)
            return ending
    except Exception as error:
        if isinstance(error, Refusal) or not disk.is_full(error):
            raise
        return Ending(False, disk.full())


def plan_and_advance(
    children: Children,
    jobs: int | None,
    targets: list[str],
    advance: Callable[[Plan], None],
    watch: Watch | None = None,
) -> Ending:
    """Do the same in a workspace that `workspace.alone` holds, with these children."""
    watch = watch or Watch()
    with watch.shown():
        run = plan(jobs, targets, children, watch)
        if run.todo:
            if "code" not in run.todo:
                workspace.claim()
            advance(run)
    ending = conclude(run)
    if ending.ok and not targets:
        workspace.clear_scratch()
    return ending


def conclude(run: Plan) -> Ending:
    """Show how every stage ended and where the report is."""
    outcomes = run.outcomes()
    summary.show_outcomes(outcomes)
    if summary.is_current(outcomes):
        summary.show_report()
    else:
        summary.show_evaluated(outcomes)
    return replace(_ending(outcomes), stages=summary.outcome_rows(outcomes))


def _ending(outcomes: Sequence[Outcome]) -> Ending:
    if reasons := {outcome.reason for outcome in outcomes if outcome.state == "skipped" and outcome.reason}:
        return Ending(False, "; ".join(sorted(reasons)))
    if failed := [outcome for outcome in outcomes if outcome.state == "failed"]:
        return Ending(False, summary.blame(failed))
    if left := [outcome.stage for outcome in outcomes if outcome.state == "skipped"]:
        return Ending(False, f"{', '.join(left)} did not run, and nothing says why; run it again.")
    return Ending(True, summary.totals(outcomes))
