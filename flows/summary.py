"""Summarize a run on the terminal and in Prefect's artifact."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from flows import scores
from flows.plan import Outcome
from flows.terminal import console
from stages.core.errors import Refusal
from stages.core.files import REPORT
from stages.job.load import load
from stages.job.params import SUITES
from stages.job.pieces import dvc_name

_PAGE = REPORT / "index.html"
_STATES = {
    "ran": "ran",
    "restored": "restored from the cache",
    "unchanged": "unchanged",
    "failed": "failed",
    "skipped": "skipped",
}


def outcome_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return a row a stage."""
    return [
        {"stage": o.stage, "outcome": _STATES[o.state], "seconds": o.seconds, "reason": o.reason}
        for o in outcomes
    ]


def totals(outcomes: Sequence[Outcome]) -> str:
    """Return a sentence with the totals, or that everything is cached."""
    counts = Counter[str](outcome.state for outcome in outcomes)
    if set(counts) <= {"unchanged"}:
        return f"Everything is cached: {len(outcomes)} stages are up to date, nothing was run."
    parts = [f"{counts[state]} {word}" for state, word in _STATES.items() if counts[state]]
    seconds = sum(outcome.seconds for outcome in outcomes)
    return f"{len(outcomes)} stages: {', '.join(parts)}; {seconds:.0f} s of stages."


def blame(failed: Sequence[Outcome]) -> str:
    """Return a line for each reason, with the stages that failed for it."""
    stages: dict[str, list[str]] = {}
    for outcome in failed:
        stages.setdefault(outcome.reason, []).append(outcome.stage)
    lines = [f"  - {', '.join(names)}: {reason}" for reason, names in stages.items()]
    return f"{len(failed)} stage(s) failed:\n" + "\n".join(lines)


def show_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Print the stages that were not up to date, and the totals."""
    changed = [outcome for outcome in outcomes if outcome.state != "unchanged"]
    if changed:
        table = Table("stage", "outcome", "seconds", title="Stages", box=box.SIMPLE)
        for outcome in changed:
            table.add_row(outcome.stage, _STATES[outcome.state], f"{outcome.seconds:.1f}")
        console.print(table)
    console.print(totals(outcomes))


def is_current(outcomes: Sequence[Outcome]) -> bool:
    """Tell whether the report on disk belongs to this run: its stage was requested and did not fail."""
    return any(o.stage == "report" and o.state in ("ran", "restored", "unchanged") for o in outcomes)


def show_report() -> None:
    """Print the scores of the report and the path of its page, if there is a report."""
    rows = scores.summarized()
    if not rows:
        return
    console.print("Results")
    scores.show_scores(rows, console)
    console.print(f"The report: {_PAGE.resolve()}", soft_wrap=True)


def show_changes(rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the report with what changed since the last commit and print its path, if the report is new.

    Args:
        rows: those of `outcome_rows`.
    """
    made = (_STATES["ran"], _STATES["restored"])
    if not any(row["stage"] == "report" and row["outcome"] in made for row in rows):
        return
    from flows.changes.asked import compare  # DVC takes a second
    from flows.changes.revisions import read_revision
    from flows.changes.webpage import write_changes

    try:
        if read_revision("HEAD").hash(str(REPORT)) in (None, read_revision(None).hash(str(REPORT))):
            return
        page = write_changes(compare(["HEAD"], tensors=False), "HEAD", reported=True)
    except Refusal:  # no git, or a first commit that is still to come
        return
    except Exception as error:  # such as a commit whose params are of an older form
        console.print(f"what changed since HEAD cannot be told: {error}", markup=False, soft_wrap=True)
        return
    console.print(f"With what changed since HEAD: {page.resolve()}", soft_wrap=True)


def show_evaluated(outcomes: Sequence[Outcome]) -> None:
    """Print the scores of the candidates that a run without a report has evaluated, if any."""
    ran = {o.stage for o in outcomes if o.state == "ran" and o.stage.partition("@")[0] in SUITES}
    if not ran:
        return
    try:
        params = load(device=False)
        evaluated = [name for name in params.evaluations() if dvc_name("evaluate", params, name) in ran]
        shown = scores.computed(params, list(dict.fromkeys(name.rpartition("/")[0] for name in evaluated)))
    except Refusal:  # params.yaml was edited meanwhile, which the ending says
        return
    console.print("Results; `prunequant show` prints all")
    scores.show_scores(shown.scores, console)
    for note in shown.notes:
        console.print(note, style="yellow", markup=False, soft_wrap=True)
