"""What dvc.lock holds, read while DVC may be writing it.

DVC writes the file in place, so a stage that starts beside another may meet a part of it. A part can still
parse: then entries are missing, and a stage would note that nothing is known of its inputs. So a reader waits
until the file is whole and has the outputs that it needs.
"""

import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from stages.core.errors import Refusal

LOCK = Path("dvc.lock")
Entries = dict[str, Any]
"""What dvc.lock holds, by stage."""
_PATIENCE = 10.0
"""Seconds that DVC may take to write the file."""
_PARTS = {"deps": list, "outs": list, "params": dict}
_HASHES = {"md5", "etag", "checksum"}
"""What DVC knows an output by: a file here, or one that a stage leaves in a remote store."""


def locked_stages(wanted: Iterable[str] = ()) -> Entries:
    """Return the stages of dvc.lock; none if there is no such file.

    Args:
        wanted: paths of outputs; wait until the file names them, for ten seconds at most.

    Raises:
        Refusal: it is not whole, and stays so.
    """
    needed, deadline = set(wanted), time.monotonic() + _PATIENCE
    while LOCK.exists():
        entries = whole(LOCK.read_text(encoding="utf-8", errors="replace"))
        if entries is not None and needed <= outs(entries).keys():
            return entries
        if time.monotonic() > deadline:
            if entries is not None:
                return entries
            raise Refusal(
                "dvc.lock is cut off or does not parse; `prunequant run` restores it, or `git checkout "
                "dvc.lock` takes the committed one."
            )
        time.sleep(0.1)
    return {}


def outs(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the MD5 of every output in dvc.lock, by path."""
    return {
        out["path"]: out["md5"] for entry in entries.values() for out in entry.get("outs", ()) if "md5" in out
    }


@lru_cache(maxsize=1)  # a stage asks several times, and a lock of a long sweep takes a second to parse
def whole(text: str) -> Entries | None:
    """Return the entries of a lock, or None if it is cut off within an entry; do not change them.

    A lock that is cut off between two entries passes. A file that ends in mid-line does not, as its last
    value may be half of itself.
    """
    if not text.endswith("\n"):
        return None
    try:
        stages: Entries = yaml.load(text, yaml.CSafeLoader)["stages"]
        return stages if all(map(_is_whole, stages.values())) else None
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError):
        return None


def _is_whole(entry: Any) -> bool:
    """Tell whether an entry has all parts; its outputs come last, and not every stage has any."""
    kinds = all(isinstance(entry.get(name, kind()), kind) for name, kind in _PARTS.items())
    return kinds and "cmd" in entry and all(_HASHES & out.keys() for out in entry.get("outs", []))
