"""Turning a pydantic error into one sentence: where in params.yaml, which value, which values are allowed.

Pydantic's own location contains the tags of unions, and its messages list neither fields nor methods, so the
location is followed through the schema's annotations instead.
"""

import difflib
import json
from collections.abc import Iterable
from typing import Annotated, Any, get_args, get_origin

from pydantic import Tag

from stages.core.schema import Strict

PLAINER = {
    "dict_type": "it must be a mapping from names, {} for none",
    "model_type": "it must be a mapping of fields",
    "model_attributes_type": "it must be a mapping of fields",
    "tuple_type": "it must be a list",
    "too_short": "it must not be empty",
    "int_type": "it must be a whole number",
    "int_from_float": "it must be a whole number",
    "finite_number": "it must be a finite number",
}


def allowed(known: Iterable[str], value: str | None = None) -> str:
    """Format `allowed: a, b`, preceded by the known name closest to `value`."""
    names = sorted(known)
    close = difflib.get_close_matches(value, names, 1) if value else []
    return (f"did you mean {close[0]!r}? " if close else "") + f"allowed: {', '.join(names) or 'none'}"


def tag(config: type[Strict]) -> str:
    """Return the word that picks a class of a union: its `method`, `kind`, `format` or `test`."""
    keys = ("method", "kind", "format", "test")
    field = next(config.model_fields[key] for key in keys if key in config.model_fields)
    return str(get_args(field.annotation)[0])


def _tag_of(member: Any) -> str:
    """Return the word that stands for a member of a union in an error's location."""
    tags = [extra.tag for extra in get_args(member)[1:] if isinstance(extra, Tag)]
    return tags[0] if tags else tag(member)


def _bare(annotation: Any) -> Any:
    """Strip `Annotated` and `| None` from an annotation."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    parts = [part for part in get_args(annotation) if part is not type(None)]
    return _bare(parts[0]) if type(None) in get_args(annotation) and len(parts) == 1 else annotation


def _follow(root: type[Strict], loc: tuple[Any, ...]) -> tuple[Any, list[str]]:
    """Follow `loc` from `root`; return the annotation there, and `loc` without the tags of unions."""
    at: Any = root
    words: list[str] = []
    for part in loc:
        at = _bare(at)
        if isinstance(at, type) and issubclass(at, Strict):
            at = at.model_fields[part].annotation if part in at.model_fields else object
        elif get_origin(at) in (dict, tuple):
            at = get_args(at)[-1 if get_origin(at) is dict else 0]
        elif members := [member for member in get_args(at) if part == _tag_of(member)]:
            (at,) = members
            continue
        words.append(repr(str(part))[1:-1])
    return _bare(at), words


def follows(details: Any) -> bool:
    """Tell whether an error only follows from another: a list is too short without its bad items."""
    return details["type"] == "too_short" and len(details["input"]) >= details["ctx"]["min_length"]


def sentence(details: Any, root: type[Strict]) -> str:
    """Say where a pydantic error is, which value was given and which are allowed."""
    kind, value, loc, context = details["type"], details["input"], details["loc"], details.get("ctx", {})
    name = loc[-1] == "[key]"
    at, words = _follow(root, loc[:-1] if name else loc)
    where = ".".join(words)
    if kind in ("extra_forbidden", "missing"):
        fields = _follow(root, loc[:-1])[0].model_fields
        if kind == "missing":
            if examples := fields[loc[-1]].examples:
                return f"{where}: this field is missing; for none write `{where}: {json.dumps(examples[0])}`."
            needed = [field for field, info in fields.items() if info.is_required()]
            return f"{where}: this field is missing; needed: {', '.join(needed)}."
        return f"{where}: no such field; {allowed(fields, words[-1])}."
    if kind == "union_tag_invalid":
        known = [tag(config) for config in get_args(at)]
        return (
            f"{where}.{context['discriminator'].strip(chr(39))}: {context['tag']!r} given; "
            f"{allowed(known, str(context['tag']))}."
        )
    if kind == "union_tag_not_found":
        field = context["discriminator"].strip("'")
        return f"{where}.{field}: this field is missing; {allowed(tag(config) for config in get_args(at))}."
    message = PLAINER.get(kind) or str(details["msg"]).removeprefix("Value error, ").replace(
        "Input should be", "it must be"
    )
    if kind == "value_error" and isinstance(value, dict):  # fields that disagree; the sentence names them
        return f"{where}: {message}."
    return f"{where}: {'bad name ' if name else ''}{_shown(value)}{'' if name else ' given'}; {message}."


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    return "null" if value is None else "a list" if isinstance(value, list | tuple) else repr(value)
