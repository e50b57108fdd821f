"""What changed between two revisions, and whether a changed score means anything.

From git and DVC's cache alone: changed params, artifacts whose hash differs (models tensor by tensor),
scores that differ, and the items whose answer turned from right to wrong or back. Beside each changed
score stand the noise floor, how far the same measure moved between a model and itself at another batch
size (`noise/` candidates), and the verdict the report would give: a difference within the floor, or one
that is luck over these items, says nothing about the recipes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from flows import revisions, tensors
from flows.revisions import WORKSPACE, Revision
from stages.core.tables import SAMPLE_COLUMNS, SAMPLES, SCORE_COLUMNS, SCORES, table
from stages.reporting.collect import KEY, Results, noise_floor, records
from stages.reporting.comparison import between

ITEM = ["candidate", "suite", "task", "readout", "doc_id", "prompt_hash", "metric"]


def diff(old_name: str, new_name: str | None) -> dict[str, Any]:
    """Everything that differs, as plain values; `new_name` None is the workspace.

    Raises:
        Refusal: an unknown revision.
    """
    old, new = revisions.read(old_name), revisions.read(new_name)
    outs = results(old, new)
    scores = [_table(revision, SCORES, outs) for revision in (old, new)]
    samples = [_table(revision, SAMPLES, outs) for revision in (old, new)]
    found = {
        "revisions": [old.name, new.name],
        "params": list(params(old.params, new.params)),
        "artifacts": list(artifacts(old, new)),
        "scores": score_changes(*(Results(*tables) for tables in zip(scores, samples, strict=True))),
        "flipped": flips(*samples),
        "warnings": [*machine_changes(old, new), *run_changes(*scores)],
    }
    return {**found, "missing": [missing(revision) for revision in (old, new) if revision.missing]}


def params(old: Any, new: Any, key: str = "") -> Iterator[dict[str, Any]]:
    """Leaves that differ, by their dotted key; null stands for a key that is not there."""
    if isinstance(old, dict) or isinstance(new, dict):
        old, new = (
            side if isinstance(side, dict) else {} if side is None else {"": side} for side in (old, new)
        )
        for name in dict.fromkeys([*old, *new]):
            yield from params(old.get(name), new.get(name), f"{key}.{name}".strip("."))
    elif old != new:
        yield {"key": key, "old": old, "new": new}


def artifacts(old: Revision, new: Revision) -> Iterator[dict[str, Any]]:
    """Outputs added, removed or changed; a changed model with its tensors where both are in the cache."""
    for path in sorted(old.outs.keys() | new.outs.keys()):
        if old.hash(path) == new.hash(path):
            continue
        was, now = old.outs.get(path), new.outs.get(path)
        change = "changed" if was and now else "added" if now else "removed"
        row: dict[str, Any] = {"path": path, "change": change}
        row |= {"old_bytes": was and was.get("size"), "new_bytes": now and now.get("size")}
        if change == "changed" and path.startswith("data/models/"):
            sides = [
                [file for name, file in revision.files(path).items() if name.endswith(".safetensors")]
                for revision in (old, new)
            ]
            if not {path} & (old.missing | new.missing):
                row["tensors"] = tensors.compare(*sides)
        yield row


def results(old: Revision, new: Revision) -> list[str]:
    """The results to read: those that differ, and those their noise floor is taken from.

    What the cache lacks on either side is left out, as its rows would look added or removed.
    """
    found = {path for path in old.outs.keys() | new.outs.keys() if path.startswith("data/results/")}
    differ = {
        path for path in found if old.outs.get(path, {}).get("md5") != new.outs.get(path, {}).get("md5")
    }
    noisy = {
        candidate
        for revision in (old, new)
        for name, recipe in revision.params["noise"].items()
        for candidate in (f"noise/{name}", recipe["source"])
    }
    suites = {Path(path).name for path in differ}
    floors = {f"data/results/{candidate}/{suite}" for candidate in noisy for suite in suites} & found
    wanted = differ | floors
    for revision in (old, new):
        for path in wanted & revision.outs.keys():
            revision.files(path)
    return sorted(wanted - old.missing - new.missing)


def score_changes(old: Results, new: Results) -> list[dict[str, Any]]:
    """Rows whose value differs or that only one side has, with the noise floor, `p` and `verdict`.

    The verdict is that of `stages.reporting.comparison`, empty where there is nothing to compare with; it goes by
    `p_corrected`, over the `family` of that many comparisons.
    """
    if old.scores.empty and new.scores.empty:
        return []
    key = ["candidate", "base", *KEY]
    sides = [side.scores[[*key, "value"]] for side in (old, new)]
    both = sides[0].merge(sides[1], on=key, how="outer", suffixes=("_old", "_new"))
    same = (both["value_old"] == both["value_new"]) | both[["value_old", "value_new"]].isna().all(axis=1)
    both = both[~same].merge(noise_floor(old.scores, new.scores).reset_index(), on=["base", *KEY], how="left")
    judged = ["p", "p_corrected", "family", "verdict"]
    both = both.merge(between(old, new)[[*key, *judged]], on=key, how="left")
    both["difference"] = both["value_new"] - both["value_old"]
    return records(both.rename(columns={"value_old": "old", "value_new": "new"}))


def flips(old: pd.DataFrame, new: pd.DataFrame) -> list[dict[str, Any]]:
    """Items asked the same way on both sides, and right on one side only."""
    told = ["target", "difficulty", "response", "score"]
    sides = [
        side[side["target"].notna() & side["score"].isin([0.0, 1.0])][[*ITEM, *told]] for side in (old, new)
    ]
    both = sides[0].merge(sides[1].drop(columns=["target", "difficulty"]), on=ITEM, suffixes=("_old", "_new"))
    both = both[both["score_old"] != both["score_new"]]
    both["became"] = both["score_new"].map({1.0: "right", 0.0: "wrong"})
    return records(both.drop(columns=["score_old", "score_new", "prompt_hash"]))


def machine_changes(old: Revision, new: Revision) -> Iterator[str]:
    """Models on both sides that were computed on unlike machines or versions."""
    for path in sorted(old.outs.keys() & new.outs.keys()):
        if path.startswith("data/models/") and old.hash(path) != new.hash(path):
            sides = [_record(revision, path).get("numerics", {}) for revision in (old, new)]
            for name in sides[0].keys() & sides[1].keys():
                if sides[0][name] != sides[1][name]:
                    yield f"{path}: {name} was {sides[0][name]}, is {sides[1][name]}"


def run_changes(old: pd.DataFrame, new: pd.DataFrame) -> list[str]:
    """Evaluations of one candidate and suite that ran under unlike conditions."""
    told: list[str] = []
    key, columns = ["candidate", "suite"], ["device", "threads", "dtype", "batch_size"]
    sides = [side.drop_duplicates(key)[[*key, *columns]] for side in (old, new)]
    for row in sides[0].merge(sides[1], on=key, suffixes=("_old", "_new")).to_dict("records"):
        for column in columns:
            was, now = row[f"{column}_old"], row[f"{column}_new"]
            if was != now and not (pd.isna(was) and pd.isna(now)):
                told.append(f"{row['candidate']} on {row['suite']}: {column} was {was}, is {now}")
    return told


def missing(revision: Revision) -> dict[str, Any]:
    """What the cache lacks of a revision, and the command that brings it from the remote."""
    paths = sorted(revision.missing)
    if revision.name == WORKSPACE:
        command = " ".join(["dvc pull", *paths])
    else:  # dvc fetch --all-commits passes over commits it cannot read, and says so in a warning only
        fetch = " ".join(["dvc fetch", *paths])
        command = f"git checkout --quiet --detach {revision.name} && {fetch}; git checkout --quiet -"
    return {"revision": revision.name, "outputs": paths, "command": command}


def _table(revision: Revision, name: str, outs: list[str]) -> pd.DataFrame:
    """One of the tables of some results, with all columns even where there is no result."""
    columns = SCORE_COLUMNS if name == SCORES else SAMPLE_COLUMNS
    files = [revision.file(out, name) for out in outs]
    frames = [pd.read_parquet(file) for file in files if file]
    return pd.concat(frames, ignore_index=True).astype(columns) if frames else table([], columns)


def _record(revision: Revision, out: str) -> dict[str, Any]:
    file = revision.file(out, "artifact.json")
    record: dict[str, Any] = json.loads(file.read_text()) if file else {}
    return record
