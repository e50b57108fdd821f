"""What keeps two scores from being compared, beside the recipes: data, versions, machines and settings.

`because` of a row is a sentence, `kind` the sort of reason, and `of` what it holds for. Other data is asked
other questions; other versions, machines or settings move scores by themselves, see the noise of a score.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pandas as pd

from flows.changes.revisions import Revision
from stages.core.files import DATASETS, MODELS, RECORD, RESULTS, read_json
from stages.core.tables import MEASURE
from stages.reporting.collect import records

_COLUMNS = {
    "dataset_source": "data", "task_version": "data", "template": "data", "shots": "data",
    "prompt_hash": "data", "num_items": "data", "backend": "versions", "device": "machine",
    "threads": "settings", "dtype": "settings", "batch_size": "settings", "bos": "settings",
    "penalties": "settings", "temperature": "settings", "draws": "settings", "seed": "settings",
}  # fmt: skip
"""Columns of scores that must agree, and the sort of reason if they do not."""
_NUMERICS = {"torch": "versions", "dtype": "settings", "threads": "settings"}
"""Entries of a record's numerics; all others say what machine it was."""
_PINS = re.compile(r"^([\w.-]+(?:\[[\w,-]+\])?)==(\S+)", re.M)
_PACKAGES = 6
"""Packages named in a sentence."""


class Reason(NamedTuple):
    """A reason, and the results or models that it holds for."""

    kind: str
    because: str
    of: str


def incomparable(
    old: Revision,
    new: Revision,
    scores: tuple[pd.DataFrame, pd.DataFrame],
    models: Iterable[tuple[str, str]],
    evaluations: Iterable[tuple[str, str, str]],
) -> list[dict[str, Any]]:
    """Return every reason once, with all that it holds for.

    Args:
        scores: the score rows that are compared, by the same candidates on both sides.
        models: pairs of artifacts that are compared.
        evaluations: what a comparison is called, and the two results behind it, `<candidate>/<suite>`.
    """
    of: dict[tuple[str, str], dict[str, None]] = {}
    reasons = [
        *_of_scores(*scores),
        *(reason for pair in models for reason in _of_models(old, new, *pair)),
        *(reason for three in evaluations for reason in _of_inputs(old, new, *three)),
    ]
    for reason in reasons:
        of.setdefault((reason.kind, reason.because), {})[reason.of] = None
    return [
        {"kind": kind, "because": because, "of": list(names)} for (kind, because), names in sorted(of.items())
    ]


def _of_scores(old: pd.DataFrame, new: pd.DataFrame) -> Iterator[Reason]:
    key = ["candidate", *MEASURE]
    sides = [side[side["difficulty"] == "all"][[*key, *_COLUMNS]] for side in (old, new)]
    for row in records(sides[0].merge(sides[1], on=key, suffixes=("_old", "_new"))):
        for column, kind in _COLUMNS.items():
            was, now = row[f"{column}_old"], row[f"{column}_new"]
            if was == now or None in (was, now):  # older results do not say
                continue
            because = f"{column} was {was}, is {now}"
            if column in ("prompt_hash", "template"):
                because = "the prompts differ" if column == "prompt_hash" else "the chat template differs"
            yield Reason(kind, because, f"{row['candidate']} on {row['suite']}")


def _of_models(old: Revision, new: Revision, was: str, now: str) -> Iterator[Reason]:
    """Compare the machines and versions that two models were computed with."""
    paths = [str(MODELS / name) for name in (was, now)]
    if old.hash(paths[0]) == new.hash(paths[1]):
        return
    files = [side.file(path, RECORD) for side, path in zip((old, new), paths, strict=True)]
    sides = [read_json(file).get("numerics", {}) if file else {} for file in files]
    for name in sorted(sides[0].keys() & sides[1].keys()):
        if sides[0][name] != sides[1][name]:
            because = f"{name} was {_plain(sides[0][name])}, is {_plain(sides[1][name])}"
            yield Reason(_NUMERICS.get(name, "machine"), because, now)


def _of_inputs(old: Revision, new: Revision, label: str, was: str, now: str) -> Iterator[Reason]:
    """Compare the data, code and versions that two evaluations ran with."""
    sides = [_inputs(side, str(RESULTS / name)) for side, name in ((old, was), (new, now))]
    if not all(sides):
        return
    for path in sorted(sides[0].keys() | sides[1].keys()):
        hashes = [side.get(path) for side in sides]
        if hashes[0] == hashes[1]:
            continue
        if path == "requirements.lock":
            yield Reason("versions", _versions(old.versions, new.versions), label)
        elif path.startswith(f"{DATASETS}/"):
            yield Reason("data", f"{path} differs", label)
        elif path.startswith("data/code/"):
            yield Reason("versions", f"the code of {path.removeprefix('data/code/')} differs", label)


def _inputs(side: Revision, out: str) -> dict[str, str | None]:
    """Return the hashes of what the stage behind an output depends on."""
    for entry in side.stages.values():
        if any(each["path"] == out for each in entry.get("outs", [])):
            return {dep["path"]: dep.get("md5") for dep in entry.get("deps", [])}
    return {}


def _versions(old: str | None, new: str | None) -> str:
    """Name the packages whose versions differ."""
    was, now = (dict(_PINS.findall(text or "")) for text in (old, new))
    differing = [
        f"{name} was {was.get(name, 'not there')}, is {now.get(name, 'not there')}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]
    if not differing:
        return "requirements.lock differed"
    more = f" and {len(differing) - _PACKAGES} more" if len(differing) > _PACKAGES else ""
    return "; ".join(differing[:_PACKAGES]) + more


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
