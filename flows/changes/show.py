"""Print a diff as tables on the terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.changes.sections import Quote, Section, sections, summary

_ROWS = 20
"""Rows shown of a part that may be long; `--json` and `--html` have all."""
_LENGTH = 120
"""Characters shown of a quote."""


def show_diff(diff: dict[str, Any], console: Console) -> None:
    """Print the totals, then every part of a diff that is not empty."""
    for line in summary(diff):
        console.print(line, markup=False)
    for section in sections(diff):
        if section.title != "Scores by level":
            _show(section, console)
        else:
            console.print(f"{len(section.rows)} scores of single levels: --json or --html", markup=False)


def _show(section: Section, console: Console) -> None:
    rows = section.rows[:_ROWS] if section.detail else section.rows
    cut = f" ({len(rows)} of {len(section.rows)})" if len(rows) < len(section.rows) else ""
    table = Table(title=escape(section.title + cut), title_justify="left", box=box.SIMPLE)
    for column in section.columns:
        table.add_column(escape(column), overflow="fold")
    for row in rows:
        table.add_row(*(escape(_text(cell)) for cell in row))
    console.print(table if rows else escape(section.title))
    for note in section.notes:
        console.print(note, markup=False, soft_wrap=True)
    for command in section.commands:
        console.print(f"  {command}", style="yellow", markup=False, soft_wrap=True)


def _text(cell: str | Quote) -> str:
    return cell.clipped(_LENGTH) if isinstance(cell, Quote) else cell
