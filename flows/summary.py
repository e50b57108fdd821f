"""Summarize a run on the terminal and in Prefect's artifact."""

import csv
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from flows.plan import Outcome
from flows.terminal import console
from stages.core.files import REPORT

_SUMMARY = REPORT / "summary.csv"
_PAGE = REPORT / "index.html"
_MEGABYTES = {"bytes_ideal": "MB ideal", "bytes_on_disk": "MB on disk"}
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


def result_rows() -> list[dict[str, str]]:
    """Return the report's summary as text, a row a candidate; nothing if there is no report."""
    if not (_SUMMARY.exists() and _PAGE.exists()):
        return []
    with _SUMMARY.open(encoding="utf-8", newline="") as file:
        return [
            {
                _MEGABYTES.get(key, key): _short(value, 1e6 if key in _MEGABYTES else 1)
                for key, value in row.items()
            }
            for row in csv.DictReader(file)
        ]


def show_report() -> None:
    """Print the report's summary and the path of its page, if there is a report."""
    rows = result_rows()
    if not rows:
        return
    table = Table(title="Results", box=box.SIMPLE)
    for column in rows[0]:
        heading = column.replace(".", " ").replace("_", " ").replace(" ", "\n")
        table.add_column(heading, justify="left" if column == "candidate" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    console.print(f"The report: {_PAGE.resolve()}")


def _short(text: str, divisor: float) -> str:
    try:
        return f"{float(text) / divisor:.4g}"
    except ValueError:
        return text
