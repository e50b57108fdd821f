"""What changed between two revisions, and whether a changed score means anything.

It is read from git and DVC's cache alone: changed params, artifacts whose hash differs (models tensor by
tensor), scores that differ, and items whose answer turned from right to wrong or back. Beside each changed
score stand its noise, how far the same measure moves when only its arithmetic changes (`noise/`
candidates), and the word of the report for the difference: same, worse, below noise, or not settled over
these items. Hypotheses whose verdict turned come first.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from flows.revisions import WORKSPACE, Revision, read_revision
from flows.tensors import compare_tensors
from stages.core.files import MODELS, RECORD, REPORT, RESULTS, read_json
from stages.core.tables import MEASURE, SAMPLE_COLUMNS, SAMPLES, SCORE_COLUMNS, SCORES, table
from stages.reporting.collect import KEY, Results, measure_of, noise_by_measure, records
from stages.reporting.comparison import compare_revisions
from stages.reporting.export import MEASURED_VERDICTS, VERDICTS
from stages.reporting.words import labels

_MARGIN = 0.02
"""The margin of a revision whose params.yaml sets none."""
_ITEM = ["candidate", *MEASURE, "doc_id", "draw", "prompt_hash"]


def diff_revisions(old_name: str, new_name: str | None) -> dict[str, Any]:
    """Return everything that differs, as plain values; `new_name` None is the workspace.

    Raises:
        Refusal: a revision does not exist.
    """
    old, new = read_revision(old_name), read_revision(new_name)
    outs = results_to_read(old, new)
    results = [read_results(revision, outs) for revision in (old, new)]
    margin = new.params.get("report", {}).get("margin", _MARGIN)
    changes = {
        "revisions": [old.name, new.name],
        "params": list(param_changes(old.params, new.params)),
        "artifacts": list(artifact_changes(old, new)),
        "verdicts": verdict_changes(*(read_verdicts(revision) for revision in (old, new))),
        "scores": score_changes(results[0], results[1], margin),
        "flipped": flipped_items(*(side.samples for side in results)),
        "warnings": [*machine_changes(old, new), *run_changes(*(side.scores for side in results))],
    }
    gaps = [missing_outputs(revision) for revision in (old, new) if revision.missing]
    return {**changes, "missing": gaps}


def param_changes(old: Any, new: Any, key: str = "") -> Iterator[dict[str, Any]]:
    """Yield the leaves that differ, by dotted key, None where a side has no such key."""
    if isinstance(old, dict) or isinstance(new, dict):
        old, new = (
            side if isinstance(side, dict) else {} if side is None else {"": side} for side in (old, new)
        )
        for name in dict.fromkeys([*old, *new]):
            yield from param_changes(old.get(name), new.get(name), f"{key}.{name}".strip("."))
    elif old != new:
        yield {"key": key, "old": old, "new": new}


def artifact_changes(old: Revision, new: Revision) -> Iterator[dict[str, Any]]:
    """Yield outputs added, removed or changed; a changed model with its tensors if both are in the cache."""
    for path in sorted(old.outs.keys() | new.outs.keys()):
        if old.hash(path) == new.hash(path):
            continue
        was, now = old.outs.get(path), new.outs.get(path)
        change = "changed" if was and now else "added" if now else "removed"
        row: dict[str, Any] = {"path": path, "change": change}
        row |= {"old_bytes": was and was.get("size"), "new_bytes": now and now.get("size")}
        if change == "changed" and Path(path).is_relative_to(MODELS):
            sides = [
                [file for name, file in revision.files(path).items() if name.endswith(".safetensors")]
                for revision in (old, new)
            ]
            if not {path} & (old.missing | new.missing):
                row["tensors"] = compare_tensors(*sides)
        yield row


def results_to_read(old: Revision, new: Revision) -> list[str]:
    """Return the results that differ, and those that their noise is measured on.

    Results that the cache lacks on either side are left out, or their rows would look added or removed.
    """
    paths = {path for path in old.outs.keys() | new.outs.keys() if Path(path).is_relative_to(RESULTS)}
    differing = {path for path in paths if old.hash(path) != new.hash(path)}
    noisy = {
        candidate
        for revision in (old, new)
        for name, recipe in revision.params["noise"].items()
        for candidate in (f"noise/{name}", recipe["source"])
    }
    suites = {Path(path).name for path in differing}
    wanted = differing | (
        {str(RESULTS / candidate / suite) for candidate in noisy for suite in suites} & paths
    )
    for revision in (old, new):
        for path in wanted & revision.outs.keys():
            revision.files(path)
    return sorted(wanted - old.missing - new.missing)


def read_results(revision: Revision, outs: list[str]) -> Results:
    """Read some results of a revision; columns that its older tables lack are empty."""
    tables = []
    for name, columns in ((SCORES, SCORE_COLUMNS), (SAMPLES, SAMPLE_COLUMNS)):
        files = [file for out in outs if (file := revision.file(out, name))]
        frames = [pd.read_parquet(file).reindex(columns=list(columns)).astype(columns) for file in files]
        tables.append(pd.concat(frames, ignore_index=True) if frames else table([], columns))
    return Results(*tables)


def read_verdicts(revision: Revision) -> dict[str, Any]:
    """Return the verdicts of a revision by study and hypothesis; empty if its report has none."""
    verdicts: dict[str, Any] = {}
    for name in (VERDICTS, MEASURED_VERDICTS) if revision.params.get("studies") else ():
        if file := revision.file(str(REPORT), name):
            for study, judged in read_json(file).items():
                verdicts.setdefault(study, {}).update(judged)
    return verdicts


def verdict_changes(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Return hypotheses whose verdict turned, or that a side lacks (None), with the new reason."""
    changes: list[dict[str, Any]] = []
    for study in dict.fromkeys([*old, *new]):
        was, now = old.get(study, {}), new.get(study, {})
        for key in dict.fromkeys([*was, *now]):
            before, after = was.get(key, {}), now.get(key, {})
            if before.get("verdict") != after.get("verdict"):
                sides = {"old": before.get("verdict"), "new": after.get("verdict")}
                changes.append({"study": study, "hypothesis": key, **sides, "why": after.get("why")})
    return changes


def score_changes(old: Results, new: Results, margin: float = _MARGIN) -> list[dict[str, Any]]:
    """Return scores that differ or that a side lacks, with `label`, `noise`, `p` and `verdict`.

    The verdict is that of `stages.reporting.margins`, missing where there is nothing to compare with or
    nobody asks; it goes by `p_corrected`, over a `family` of that many comparisons.

    Args:
        margin: the largest change that does not matter.
    """
    if old.scores.empty and new.scores.empty:
        return []
    key = ["candidate", "base", *KEY]
    sides = [side.scores[[*key, "value"]] for side in (old, new)]
    both = sides[0].merge(sides[1].assign(in_new=True), on=key, how="outer", suffixes=("_old", "_new"))
    both["in_new"] = both["in_new"].notna()
    same = (both["value_old"] == both["value_new"]) | both[["value_old", "value_new"]].isna().all(axis=1)
    both = both[~same].merge(noise_by_measure(old.scores, new.scores), on=["base", *KEY], how="left")
    judged = ["p", "p_corrected", "family", "verdict", "pairs", "smallest"]
    both = both.merge(compare_revisions(old, new, margin)[[*key, *judged]], on=key, how="left")
    both["difference"] = both["value_new"] - both["value_old"]
    label = labels(pd.concat([old.scores, new.scores]))
    rows = records(both.rename(columns={"value_old": "old", "value_new": "new"}))
    return [row | {"label": label[measure_of(row)]} for row in rows]


def worsened(row: dict[str, Any], verdicts: tuple[str, ...]) -> bool:
    """Tell whether a row of `score_changes` has one of these verdicts, or a score became NaN."""
    lost = row["old"] is not None and row["new"] is None and row["in_new"]
    return row["verdict"] in verdicts or lost


def unsure(changes: dict[str, Any]) -> str:
    """Say what keeps a diff from telling whether scores got worse; empty if nothing does."""
    gaps = [f"{len(gap['outputs'])} output(s) of {gap['revision']}" for gap in changes["missing"]]
    if gaps:
        return f"the cache lacks {' and '.join(gaps)}, so some scores were not compared; fetch them."
    untested = [
        f"{row['candidate']} on {row['suite']}" for row in changes["scores"] if row["verdict"] == "untested"
    ]
    names = ", ".join(dict.fromkeys(untested))
    return f"the sides share no items for {names}, so these scores were not compared." if names else ""


def flipped_items(old: pd.DataFrame, new: pd.DataFrame) -> list[dict[str, Any]]:
    """Return items with the same prompt on both sides that are right on one side only."""
    shown = ["target", "difficulty", "response", "score"]
    sides = [
        side[side["target"].notna() & side["score"].isin([0.0, 1.0])][[*_ITEM, *shown]] for side in (old, new)
    ]
    both = sides[0].merge(
        sides[1].drop(columns=["target", "difficulty"]), on=_ITEM, suffixes=("_old", "_new")
    )
    both = both[both["score_old"] != both["score_new"]]
    both["became"] = both["score_new"].map({1.0: "right", 0.0: "wrong"})
    return records(both.drop(columns=["score_old", "score_new", "prompt_hash"]))


def machine_changes(old: Revision, new: Revision) -> Iterator[str]:
    """Yield a sentence for each model that the sides computed on different machines or versions."""
    for path in sorted(old.outs.keys() & new.outs.keys()):
        if Path(path).is_relative_to(MODELS) and old.hash(path) != new.hash(path):
            sides = [_record(revision, path).get("numerics", {}) for revision in (old, new)]
            for name in sides[0].keys() & sides[1].keys():
                if sides[0][name] != sides[1][name]:
                    yield f"{path}: {name} was {sides[0][name]}, is {sides[1][name]}"


def run_changes(old: pd.DataFrame, new: pd.DataFrame) -> list[str]:
    """Return a sentence for each candidate and suite that the sides evaluated under different conditions."""
    sentences: list[str] = []
    key = ["candidate", "suite"]
    columns = ["device", "threads", "dtype", "batch_size", "backend"]
    sides = [side.drop_duplicates(key)[[*key, *columns]] for side in (old, new)]
    for row in records(sides[0].merge(sides[1], on=key, suffixes=("_old", "_new"))):
        for column in columns:
            was, now = row[f"{column}_old"], row[f"{column}_new"]
            if was != now and not (column == "backend" and None in (was, now)):  # older results do not say
                sentences.append(f"{row['candidate']} on {row['suite']}: {column} was {was}, is {now}")
    return sentences


def missing_outputs(revision: Revision) -> dict[str, Any]:
    """Return the outputs of a revision that the cache lacks, and the command that fetches them."""
    paths = sorted(revision.missing)
    if revision.name == WORKSPACE:
        command = shlex.join(["dvc", "pull", *paths])
    else:  # dvc fetch --all-commits skips commits that it cannot read, with nothing but a warning
        there = shlex.join(["git", "checkout", "--quiet", "--detach", revision.name])
        command = f"{there} && {{ {shlex.join(['dvc', 'fetch', *paths])}; git checkout --quiet -; }}"
    return {"revision": revision.name, "outputs": paths, "command": command}


def _record(revision: Revision, out: str) -> dict[str, Any]:
    file = revision.file(out, RECORD)
    record: dict[str, Any] = read_json(file) if file else {}
    return record
