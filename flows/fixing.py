"""Fill in what can be known: the hashes of sources that params.yaml lacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows.layout import relaid
from stages.core.errors import Refusal
from stages.core.files import write_text
from stages.job.checks.hashes import content_hash, lacking
from stages.job.load import parsed, read


def fill_hashes(file: Path) -> list[str]:
    """Write the missing hashes of `path:` and `pypi:` sources into params.yaml; return their places in it.

    All other lines stay as they are. Only if an entry without a hash is in braces, or takes settings from an
    anchor, is the whole file laid out anew (see `flows.layout`); comments stay. A hash that is there stays
    even if the content has another: whether the new content is wanted, only its owner knows.

    Raises:
        Refusal: the file is no YAML, or sources cannot be fetched or are empty, a line each. Nothing is
            written.
    """
    read(file)
    text = file.read_text(encoding="utf-8")
    document = YAML().load(text)
    hashes, refusals = [], []
    for at, entry in lacking(document):
        try:
            hashes.append((at, entry, content_hash(entry)))
        except Refusal as refusal:
            refusals.append(f"{at}: {refusal}")
    if refusals:
        raise Refusal("\n".join([*refusals, "No hash was written."]))
    inserted = _inserted(text, [(entry, digest) for _, entry, digest in hashes])
    for _, entry, digest in hashes:
        if "sha256" in entry:
            entry["sha256"] = digest
        else:
            entry.insert(list(entry).index(_before(entry)) + 1, "sha256", digest)
    if hashes:
        whole = relaid(document)
        write_text(file, inserted if _same(inserted, whole) else whole)
    return [f"{at}.sha256" for at, _, _ in hashes]


def _before(entry: Any) -> str:
    """Return the setting after which an entry has its hash."""
    return next(key for key in ("file", "folder", "config", "source") if key in entry)


def _inserted(text: str, hashes: Sequence[tuple[Any, str]]) -> str:
    """Return the text with a line for each hash; right only if every entry has a line for each setting."""
    lines = text.splitlines(keepends=True)
    places = []
    for entry, digest in hashes:
        old = "sha256" in entry
        place = entry.lc.data.get("sha256" if old else _before(entry))
        if place is None:  # the setting comes from an anchor (`<<: *other`)
            return ""
        row, column = place[:2]
        places.append((row + (not old), old, f"{' ' * column}sha256: {digest}\n"))
    for row, old, line in sorted(places, reverse=True):
        lines[row : row + old] = [line]
    return "".join(lines)


def _same(text: str, other: str) -> bool:
    """Tell whether a text is YAML with the values of the other."""
    try:
        return bool(parsed(text) == parsed(other))
    except (YAMLError, ValueError):  # a line was put into braces
        return False
