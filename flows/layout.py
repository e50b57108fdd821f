"""How a params.yaml is written: as DVC's own editor would, and never over somebody's edits.

`dvc exp run -S` reads the file with ruamel.yaml and writes it again, 80 columns wide. It wraps longer lines
in odd places, breaks a text with a colon inside braces, such as the source of a model, gives each item of a
list its line, and drops a blank line or comment after a list. So an entry stays on its line, in braces, only
while that fits; otherwise its fields get lines of their own, as items of lists always do. An entry does not
end with a list, its own or a field's, and `evaluate`, which is a list, is the last section. A file in this
layout comes out of DVC's editor as it went in, comments included, but for the value that was set.
"""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from flows.commits import git
from stages.core.errors import Refusal
from stages.job.params import Params

_ALL = 100
"""More levels than params.yaml may have."""
EDITOR_WIDTH = 80
"""The width to which DVC's editor writes."""
_OPENED = {"models": 2, "datasets": 2, "suites": 2, "evaluate": 2, "report": 2, "studies": 4}
"""Levels of a section that have lines of their own even if they are short; of others, its entries."""


def held_text(file: Path, option: str) -> str:
    """Return what a file to be written holds; empty if there is none.

    Args:
        option: the option that names another file, for the message.

    Raises:
        Refusal: it is no text.
    """
    try:
        return file.read_text(encoding="utf-8") if file.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{file} cannot be read ({error}); name a text file with {option}.") from None


def check_replaceable(file: Path, option: str) -> None:
    """Refuse to overwrite a file that git does not hold as it is.

    Args:
        option: the option that names another file, for the message.

    Raises:
        Refusal: it has edits that are not committed, is not tracked, or lies in no repository.
    """
    if not file.exists():
        return
    try:
        lost = bool(git("status", "--porcelain", "--ignored", "--", str(file)))
    except Refusal:  # no repository, so nothing would bring it back
        lost = True
    if lost:
        raise Refusal(
            f"{file} has changes that are not committed, and they would be lost; commit them, name "
            f"another file with {option}, or overwrite them with --force."
        )


SECTIONS = (*(name for name in Params.model_fields if name != "evaluate"), "evaluate")
"""The sections of params.yaml, in the order in which they are written."""


def section_lines(name: str, value: Any, notes: Mapping[tuple[str, str], str]) -> Iterator[str]:
    """Yield the lines of a section of params.yaml.

    Args:
        notes: comments above entries, by section (such as `suites.graded`) and entry; `("", "models")` is the
            comment of the section models.
    """
    whole = CommentedMap({name: _styled(value, _OPENED.get(name, 1), len(name) + 2, 0)})

    def comment(mapping: CommentedMap, at: str, indent: int) -> None:
        for key, inner in mapping.items():
            if note := notes.get((at, str(key))):
                mapping.yaml_set_comment_before_after_key(key, before=note, indent=indent)
            if isinstance(inner, CommentedMap):
                comment(inner, f"{at}.{key}".lstrip("."), indent + 2)

    comment(whole, "", 0)
    yield from _dumped(whole, EDITOR_WIDTH).splitlines()


def relaid(document: CommentedMap) -> str:
    """Return a params.yaml, as ruamel.yaml reads it with its comments, in this layout."""

    def style(node: Any, like: Any) -> None:
        if isinstance(node, CommentedMap | CommentedSeq):
            (node.fa.set_flow_style if like.fa.flow_style() else node.fa.set_block_style)()
            for key in node if isinstance(node, CommentedMap) else range(len(node)):
                style(node[key], like[key])

    for name, content in document.items():
        style(content, _styled(content, _OPENED.get(name, 1), len(name) + 2, 0))
    return _dumped(document, EDITOR_WIDTH)


def _styled(value: Any, opened: int, column: int, indent: int) -> Any:
    """Return a value of which each part is set to stand in braces or in lines.

    Args:
        opened: levels that have lines of their own.
        column: where it would begin, in braces.
        indent: of the line it is in.
    """
    if not isinstance(value, dict | list | tuple):
        return value
    styled: CommentedMap | CommentedSeq
    if isinstance(value, dict):
        styled = CommentedMap(
            (key, _styled(inner, opened - 1, indent + len(str(key)) + 4, indent + 2))
            for key, inner in _ordered(value)
        )
    else:
        opened = _ALL  # the editor writes each list anew
        styled = CommentedSeq(_styled(inner, _ALL, indent + 2, indent) for inner in value)
    in_braces = not value or (opened < 1 and not _has_colon(value) and column + _width(value) <= EDITOR_WIDTH)
    (styled.fa.set_flow_style if in_braces else styled.fa.set_block_style)()
    return styled


def _ordered(value: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return fields in their order, but last one that does not end with a list."""
    fields = list(value.items())
    plain = [field for field in fields if not _ends_with_list(field[1])]
    if plain and _ends_with_list(fields[-1][1]):
        fields.remove(plain[-1])
        fields.append(plain[-1])
    return fields


def _ends_with_list(value: Any) -> bool:
    """Tell whether a value is a list, or fields of which the last ends with one in any order."""
    if isinstance(value, dict):
        return bool(value) and _ends_with_list(_ordered(value)[-1][1])
    return isinstance(value, list | tuple)


def _has_colon(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_colon, [*value, *value.values()]))
    return any(map(_has_colon, value)) if isinstance(value, list | tuple) else ":" in str(value)


def _width(value: Any) -> int:
    """Return the columns of a value in braces."""
    flow = CommentedSeq([_plain(value)])
    flow.fa.set_flow_style()
    return len(_dumped(flow, 10**6)) - 3


def _plain(value: Any) -> Any:
    """Return a value without comments and styles."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _dumped(value: Any, width: int) -> str:
    """Return YAML as DVC writes it."""
    editor, text = YAML(), io.StringIO()
    editor.default_flow_style, editor.width = False, width
    editor.dump(value, text)
    return text.getvalue()
