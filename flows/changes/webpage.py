"""A diff as one HTML file without scripts, which fetches nothing."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flows.changes.sections import Quote, heading, sections, summary
from stages.core.files import write_text

_LENGTH = 1500
"""Characters of a quote."""


def write_webpage(diff: dict[str, Any], file: Path) -> None:
    """Write the page, whole or not at all, into a folder that may be new."""
    write_text(file, webpage(diff))


def webpage(diff: dict[str, Any]) -> str:
    """Return the page; every text in it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("diff.html").render(
        heading=heading(diff), summary=summary(diff), sections=sections(diff), quoted=_quoted
    )


def _quoted(cell: str | Quote) -> str | None:
    """Return the text of a quote; None for any other cell."""
    return cell.clipped(_LENGTH) if isinstance(cell, Quote) else None
