"""What a run did, told on the terminal and in Prefect's artifact."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table

from flows.plan import Outcome
from flows.terminal import console
from stages.core.files import REPORT

SUMMARY = REPORT / "summary.csv"
PAGE = REPORT / "index.html"
SIZES = {"bytes_ideal": "MB ideal", "bytes_on_disk": "MB on disk"}
WORDS = {
    "ran": "ran",
    "restored": "restored from the cache",
    "unchanged": "unchanged",
    "failed": "failed",
    "skipped": "skipped",
}


def rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row a stage."""
    return [
        {"stage": o.stage, "outcome": WORDS[o.state], "seconds": o.seconds, "reason": o.reason}
        for o in outcomes
    ]


def sentence(outcomes: Sequence[Outcome]) -> str:
    """The totals; that all is cached where nothing had to be done."""
    counts = Counter[str](outcome.state for outcome in outcomes)
    if set(counts) <= {"unchanged"}:
        return f"Everything is cached: {len(outcomes)} stages are up to date, nothing was run."
    parts = [f"{counts[state]} {word}" for state, word in WORDS.items() if counts[state]]
    return f"{len(outcomes)} stages: {', '.join(parts)}; {sum(o.seconds for o in outcomes):.0f} s of stages."


def blame(failed: Sequence[Outcome]) -> str:
    """One line a failed stage, with its reason."""
    return f"{len(failed)} stage(s) failed:\n" + "\n".join(f"  - {o.stage}: {o.reason}" for o in failed)


def show(outcomes: Sequence[Outcome]) -> None:
    """Print the stages that were not simply up to date, and the totals."""
    told = [outcome for outcome in outcomes if outcome.state != "unchanged"]
    if told:
        table = Table("stage", "outcome", "seconds", title="What was done", box=box.SIMPLE)
        for outcome in told:
            table.add_row(outcome.stage, WORDS[outcome.state], f"{outcome.seconds:.1f}")
        console.print(table)
    console.print(sentence(outcomes))


def is_current(outcomes: Sequence[Outcome]) -> bool:
    """Whether the report on disk is that of this run: its stage was asked for and has not failed."""
    return any(o.stage == "report" and o.state in ("ran", "restored", "unchanged") for o in outcomes)


def show_report() -> None:
    """Print the report's summary and where the page is, where there is a report."""
    if not (SUMMARY.exists() and PAGE.exists()):
        return
    lines = pd.read_csv(SUMMARY).astype(object)
    table = Table(title="Results", box=box.SIMPLE)
    for column in map(str, lines):
        words = SIZES.get(column, column.replace(".", " ").replace("_", " "))
        first = column == "candidate"
        table.add_column(words.replace(" ", "\n"), justify="left" if first else "right", no_wrap=True)
        if column in SIZES:
            lines[column] /= 1e6
    for row in lines.to_dict("records"):
        table.add_row(*("" if pd.isna(value) else _short(value) for value in row.values()))
    console.print(table)
    console.print(f"The report: {PAGE.resolve()}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
