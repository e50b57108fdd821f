"""The hashes of sources: which content each covers, and what it should be.

The sha256 of nothing is no hash of a source: it is what an empty file or folder has, by mistake. Neither are
64 zeros, which people write until they know the hash.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.core.errors import Refusal
from stages.core.files import contents, sha256
from stages.sources.origin import fetched

_FIX = "`prunequant check --fix` writes it"


def lacking(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the entries of parsed params that need a hash and have none, after their place in params.yaml."""
    for section in ("models", "datasets"):
        entries = raw.get(section)
        for name, entry in entries.items() if isinstance(entries, Mapping) else ():
            whole = f"{section}.{name}"
            for at, part in ((whole, entry), (f"{whole}.nltk_data", _nltk(entry)), *_of_mix(whole, entry)):
                source = part.get("source") if isinstance(part, Mapping) else None
                if isinstance(source, str) and source.startswith(("path:", "pypi:")) and not _has_hash(part):
                    yield at, part


def _of_mix(at: str, entry: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a mix of texts, after their places."""
    parts = entry.get("parts") if isinstance(entry, Mapping) else None
    for name, part in parts.items() if isinstance(parts, Mapping) else ():
        yield f"{at}.parts.{name}", part


def _nltk(entry: Any) -> Any:
    return entry.get("nltk_data") if isinstance(entry, Mapping) else None


def _has_hash(entry: Mapping[str, Any]) -> bool:
    return re.fullmatch("(?!0{64})[0-9a-f]{64}", str(entry.get("sha256"))) is not None


def answer(at: str, entry: Mapping[str, Any]) -> str:
    """Say which hash an entry without one should have; a package is not downloaded to know it."""
    missing = "this hash is missing" if entry.get("sha256") is None else f"{entry['sha256']!r} is no sha256"
    if not entry["source"].startswith("path:"):
        return f"{at}.sha256: {missing}; {_FIX}."
    try:
        return f"{at}.sha256: {missing}; write {content_hash(entry)}, or {_FIX}."
    except Refusal as refusal:
        return f"{at}.sha256: {missing}, and {refusal}"


def content_hash(entry: Mapping[str, Any]) -> str:
    """Return the sha256 that an entry of `models` or `datasets` should have; a package is downloaded.

    Raises:
        Refusal: the source cannot be fetched, lacks the path, or is empty.
    """
    pieces = [entry, *(entry.get("parts") or ())]
    whole = hashlib.sha256()
    for piece in pieces:
        with fetched(piece["source"], inner_path(piece), None, data=True) as path:
            if is_empty(path):
                raise Refusal(
                    f"{piece['source']} {inner_path(piece)}".rstrip() + " is empty; correct the path."
                )
            if len(pieces) == 1:
                return sha256(path)
            with path.open("rb") as part:
                while block := part.read(2**20):
                    whole.update(block)
    return whole.hexdigest()


def inner_path(entry: Mapping[str, Any]) -> str:
    """Return the path inside a source that its hash covers; "" is all of it."""
    fields = ("folder", "file", "config")
    return next((path for field in fields if isinstance(path := entry.get(field), str)), "")


def is_empty(path: Path) -> bool:
    """Tell whether a file or folder holds nothing."""
    return not any(file.stat().st_size for file in [path, *contents(path)] if file.is_file())
