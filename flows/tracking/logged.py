"""What a tracker gets of a candidate: its params, its scores, and its artifacts by hash.

It gets nothing else: no files, no host, user, path, command or remote. Params, those in lists too, lose what
looks like a secret and the folders of local paths. An entry's key is a hash of the candidate's name and its
artifacts, so the same results have the same key on every machine.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.changes.revisions import Revision, fetch, recipes_of
from stages.core.errors import Refusal
from stages.core.files import MODELS, RESULTS, text_sha256
from stages.job.sentences import allowed

_SECRET_KEY = re.compile(
    r"(^|[._-])(token|secret|password|passwd|api[_-]?key|credentials?)$|(^|\.)command$", re.I
)
_SECRET = re.compile(r"(?<=://)[^/@\s]+@|\b(hf|ghp|gho|sk|wandb)[_-][A-Za-z0-9_-]{16,}")
_ABSOLUTE = re.compile(r"~?/[^/\n]+/[^\n]*$|[A-Za-z]:[\\/]")
_FOLDERS = re.compile(r"(file:/{2,}|(?<![\w/~.-])~?/(?!/))(?:[^/\s]+/)+|\b[A-Za-z]:\\(?:[^\\\s]+\\)*")


@dataclass(frozen=True)
class Entry:
    """One candidate of one revision."""

    candidate: str
    key: str
    """32 hexadecimal digits, the same for the same results."""
    params: dict[str, str]
    scores: dict[str, float]
    """`<suite>/<label>`, and behind it `/low`, `/high` and `/floor`."""
    artifacts: dict[str, str]
    """The md5 of the model and of each result, by path; `dvc.lock` has the same."""


def entries(revision: Revision, candidates: Sequence[str] = (), fetched: bool = False) -> list[Entry]:
    """Return an entry for each candidate.

    Args:
        candidates: of `evaluate.candidates`; empty: all that are evaluated.
        fetched: whether to bring results that the cache lacks from the default DVC remote.

    Raises:
        Refusal: a candidate is unknown or not evaluated, or the cache lacks its results.
    """
    known = list(revision.params.get("evaluate", {}).get("candidates", []))
    if unknown := [name for name in candidates if name not in known]:
        raise Refusal(f"{unknown[0]!r} is no candidate; {allowed(known, unknown[0])}.")
    results = {name: _results(revision, name) for name in candidates or known}
    if lacking := [name for name in candidates if not results[name]]:
        raise Refusal(f"{lacking[0]} is not evaluated in {revision.name}; `prunequant run` evaluates it.")
    if not any(results.values()):
        raise Refusal(f"nothing is evaluated in {revision.name}; `prunequant run` evaluates what is listed.")
    paths = [path for outs in results.values() for path in outs]
    if fetched:
        fetch((revision.outs[path] for path in paths), None)
    scores = _scores(revision, paths)
    if revision.missing:
        where, mend = "the cache lacks", "add --fetch"
        if fetched:
            where, mend = "the cache and the DVC remote lack", "whoever has them runs `dvc push`"
        count = f"{len(revision.missing)} result(s) of {revision.name}"
        raise Refusal(f"{where} {count}, such as {min(revision.missing)}; {mend}.")
    return [_entry(revision, name, outs, scores.get(name, {})) for name, outs in results.items() if outs]


def redacted(text: str) -> str:
    """Return a text without what looks like a secret, and of local paths only the last part."""
    if text.startswith("path:"):
        text = f"path:{Path(text.removeprefix('path:')).name}"
    elif _ABSOLUTE.match(text):
        text = re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    return _SECRET.sub("", _FOLDERS.sub("", text))


def _entry(revision: Revision, candidate: str, outs: Sequence[str], scores: dict[str, float]) -> Entry:
    paths = [path for path in (str(MODELS / candidate), *outs) if path in revision.outs]
    artifacts = {path: str(revision.outs[path]["md5"]) for path in paths}
    key = text_sha256(json.dumps([candidate, sorted(artifacts.items())]))[:32]
    suites = {
        name: settings
        for group in revision.params["suites"].values()
        for name, settings in group.items()
        if f"{RESULTS / candidate / name}" in outs
    }
    params = {**recipes_of(revision, candidate), "suites": suites, "run": revision.params.get("run", {})}
    return Entry(candidate, key, dict(_flat(params)), scores, artifacts)


def _results(revision: Revision, candidate: str) -> list[str]:
    return sorted(path for path in revision.outs if str(Path(path).parent) == str(RESULTS / candidate))


def _scores(revision: Revision, outs: list[str]) -> dict[str, dict[str, float]]:
    """Return the overall scores of every candidate by name."""
    from flows.changes.diff import read_results  # pandas and scipy take a second
    from stages.reporting.collect import measure_of, records
    from stages.reporting.export import with_intervals
    from stages.reporting.words import labels

    table = with_intervals(read_results(revision, outs).scores)
    label = labels(table)
    scores: dict[str, dict[str, float]] = {}
    for row in records(table[table["difficulty"] == "all"]):
        name = f"{row['suite']}/{label[measure_of(row)]}"
        values = {"": row["value"], **{f"/{end}": row[end] for end in ("low", "high", "floor")}}
        scores.setdefault(row["candidate"], {}).update(
            {
                name + end: float(value)
                for end, value in values.items()
                if value is not None and math.isfinite(value)
            }
        )
    return scores


def _flat(settings: Any, key: str = "") -> list[tuple[str, str]]:
    """Return the leaves of settings as texts, by dotted key, without those whose name says secret."""
    if _SECRET_KEY.search(key):
        return []
    if isinstance(settings, dict):
        return [pair for name, inner in settings.items() for pair in _flat(inner, f"{key}.{name}".strip("."))]
    safe = _safe(settings)
    return [(key, safe if isinstance(safe, str) else json.dumps(safe))]


def _safe(settings: Any) -> Any:
    """Return a setting, and everything in it, without secrets and folders."""
    if isinstance(settings, dict):
        return {name: _safe(inner) for name, inner in settings.items() if not _SECRET_KEY.search(str(name))}
    if isinstance(settings, list):
        return [_safe(inner) for inner in settings]
    return redacted(settings) if isinstance(settings, str) else settings
