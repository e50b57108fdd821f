"""A diff as HTML that fetches nothing: a file without scripts, or a section of the report's page.

The report is the same for everyone who has its inputs; what changed since the last run is not. So that
section stands in a copy of the page, in `data/runs`.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import escape

from flows.changes.sections import Quote, heading, sections, summary
from flows.commits import git
from stages.core.errors import Refusal
from stages.core.files import REPORT, RUNS, write_text

_LENGTH = 1500
"""Characters of a quote."""
_LINK = ' <a href="#caveats">'
_CAVEATS = '<section id="caveats"'
"""Where the report's page links to its caveats, and where they begin."""


def write_webpage(diff: dict[str, Any], file: Path) -> None:
    """Write the page, whole or not at all, into a folder that may be new."""
    write_text(file, webpage(diff))


def webpage(diff: dict[str, Any]) -> str:
    """Return the page; every text in it is escaped."""
    return _rendered("diff.html", diff)


def with_changes(report: str, diff: dict[str, Any]) -> str:
    """Return the report's page with the diff of two revisions before its caveats, and a link to it.

    Raises:
        ValueError: the page has no caveats, so no version of this project made it.
    """
    parts = report.split(_LINK), report.split(_CAVEATS)
    if any(len(part) != 2 for part in parts):
        raise ValueError("the page of the report has no caveats to put the changes before")
    last = diff["revisions"][0]
    section = _rendered("since.html", diff, last=last, commit=_commit(last))
    linked = f' <a href="#since">Since {escape(last)}</a>{_LINK}'.join(parts[0])
    return f"{section}{_CAVEATS}".join(linked.split(_CAVEATS))


def write_changes(diff: dict[str, Any], name: str, *, reported: bool) -> Path:
    """Write what changed as `data/runs/since-<name>.html` and return the path.

    Args:
        reported: whether data/report is up to date; the changes then stand in its page, else alone.
    """
    file = RUNS / f"since-{name.replace('/', '-')}.html"
    page = (REPORT / "index.html").read_text(encoding="utf-8") if reported else ""
    write_text(file, with_changes(page, diff) if reported else webpage(diff))
    return file


def _commit(revision: str) -> str:
    """Return the short hash and the day of a revision; nothing if git does not know it."""
    with suppress(Refusal):
        return git("log", "-1", "--format=%h of %ad", "--date=short", revision, "--")
    return ""


def _rendered(template: str, diff: dict[str, Any], **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(
        heading=heading(diff), summary=summary(diff), sections=sections(diff), quoted=_quoted, **values
    )


def _quoted(cell: str | Quote) -> str | None:
    """Return the text of a quote; None for any other cell."""
    return cell.clipped(_LENGTH) if isinstance(cell, Quote) else None
