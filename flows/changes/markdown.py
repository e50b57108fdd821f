"""A diff as Markdown, for the comment of a pull request.

Every ASCII mark that Markdown could read is written as a character reference, and quotes stand in `<code>`,
where GitHub links no names: what a model answered can only ever be text. Addresses would be links there too,
so `www.` has a reference for its dot, and `@`, which GitHub sees even behind a reference, stands alone.
"""

import re
from typing import Any

from flows.changes.sections import Quote, Section, heading, sections, summary

LONGEST_COMMENT = 65_536
"""Characters that GitHub takes in a comment."""
_ROWS = 20
"""Rows of a table; `--json` and `--html` have all."""
_LENGTH = 160
"""Characters of a quote."""
_MARKS = {mark: f"&#{ord(mark)};" for mark in "\\`*_{}[]<>#!|~&:$^"} | {"@": "<span>&#64;</span>"}
_SITE = re.compile(r"(www)\.", re.IGNORECASE)


def markdown(diff: dict[str, Any]) -> str:
    """Return the diff as Markdown, details folded, cut to whole parts if it is too long for a comment."""
    text = f"### {_escaped(heading(diff))}\n\n" + "".join(f"{_escaped(line)}\n\n" for line in summary(diff))
    left_out = "\nThe rest is too long for a comment; `--html` has all.\n"
    for section in sections(diff):
        part = _part(section)
        if len(text) + len(part) + len(left_out) > LONGEST_COMMENT:
            return text + left_out
        text += part
    return text


def _part(section: Section) -> str:
    lines = [f"{_escaped(note)}\n" for note in section.notes]
    lines += [f"```sh\n{command}\n```\n" for command in section.commands]
    if section.rows:
        lines.append(_line(section.columns))
        lines.append("|" + "---|" * len(section.columns))
        lines += [_line(row) for row in section.rows[:_ROWS]]
    if (left := len(section.rows) - _ROWS) > 0:
        lines.append(f"\n{left} more: `--html` or `--json`.")
    body = "\n".join(lines) + "\n\n"
    title = _escaped(section.title)
    if section.detail:
        return f"<details><summary>{title} ({len(section.rows)})</summary>\n\n{body}</details>\n\n"
    return f"#### {title}\n\n{body}"


def _line(cells: tuple[str | Quote, ...]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(cell: str | Quote) -> str:
    if not isinstance(cell, Quote):
        return _escaped(cell)
    text = cell.clipped(_LENGTH)
    return f"<code>{_escaped(text)}</code>" if text else ""


def _escaped(text: str) -> str:
    return _SITE.sub(r"\1&#46;", "".join(_MARKS.get(mark, mark) for mark in text))
