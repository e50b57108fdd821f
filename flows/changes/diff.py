"""What differs between two revisions, or between candidates of one, and whether it means anything.

It is read from git and DVC's cache alone: changed params and what they caused, models tensor by tensor,
scores, and items whose answer turned from right to wrong or back. Beside each score stand its interval, its
noise, how far the same measure moves when only its arithmetic changes (`noise/` candidates), and the word of
the report for the difference. Hypotheses whose verdict turned come first.

Candidates of one revision are compared with the first of them by the same functions: its results are read
once more under the name of each other candidate, as if they were that candidate's before.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from flows.changes.causes import causes, param_changes
from flows.changes.conditions import incomparable
from flows.changes.revisions import Revision, lacking_results, recipes_of
from flows.changes.tensors import compare_tensors
from stages.core.files import MODELS, REPORT, RESULTS, read_json
from stages.core.tables import (
    ITEM,
    ITEM_COLUMNS,
    ITEMS,
    MEASURE,
    SAMPLE_COLUMNS,
    SAMPLES,
    SCORE_COLUMNS,
    SCORES,
    table,
)
from stages.reporting.collect import KEY, Results, measure_of, noise_by_measure, records
from stages.reporting.comparison import compare_revisions
from stages.reporting.export import MEASURED_VERDICTS, VERDICTS, with_intervals
from stages.reporting.words import labels

_MARGIN = 0.02
"""The margin of a revision whose params.yaml sets none."""
_ITEM = ["candidate", *MEASURE, "doc_id", "draw", "prompt_hash"]
_JUDGED = ["p", "p_corrected", "family", "verdict", "pairs", "smallest", "lost", "won"]


def diff_revisions(old: Revision, new: Revision, tensors: bool = True) -> dict[str, Any]:
    """Return everything that differs between two revisions, as plain values.

    Args:
        tensors: whether to compare the tensors of models, which takes longest.
    """
    outs = results_to_read(old, new)
    results = [read_results(revision, outs) for revision in (old, new)]
    both = [path for path in outs if path in old.outs and path in new.outs]
    models = [
        str(Path(path).relative_to(MODELS))
        for path in old.outs.keys() & new.outs.keys()
        if Path(path).is_relative_to(MODELS)
    ]
    names = [str(Path(path).relative_to(RESULTS)) for path in both if old.hash(path) != new.hash(path)]
    changes = {
        "revisions": [old.name, new.name],
        "candidates": [],
        "params": list(param_changes(old.params, new.params)),
        "causes": causes(old, new),
        "artifacts": artifact_changes(old, new, tensors),
        "tensors_compared": tensors,
        "verdicts": verdict_changes(*(read_verdicts(revision) for revision in (old, new))),
        "scores": score_changes(results[0], results[1], _margin(new)),
        "flipped": _flipped((new, old), results[0].samples, results[1].samples),
        "uncompared": [],
        "incomparable": incomparable(
            old, new, (results[0].scores, results[1].scores),
            [(name, name) for name in sorted(models)], [(_on(name), name, name) for name in names],
        ),
    }  # fmt: skip
    gaps = [missing_outputs(side) for side in (old, new)]
    return {**changes, "missing": [gap for gap in gaps if gap["outputs"]]}


def diff_candidates(revision: Revision, names: Sequence[str], tensors: bool = True) -> dict[str, Any]:
    """Return how candidates of a revision differ from the first of them, as plain values.

    Args:
        names: two or more, `<stage>/<recipe>`.
        tensors: whether to compare the tensors of models, which takes longest.
    """
    first, *others = names
    outs = [
        path
        for path in revision.outs
        if Path(path).is_relative_to(RESULTS)
        and str(Path(path).relative_to(RESULTS).parent) in {*names, *_noisy(revision)}
    ]
    results = read_results(revision, _cached(outs, revision))
    old, new = _as_sides(results, first, others)
    scores = score_changes(old, new, _margin(revision), results.scores, unchanged=True)
    scored = {row["candidate"] for row in scores if row["old"] is not None and row["in_new"]}
    suites = _suites(path for path in outs if str(Path(path).relative_to(RESULTS).parent) in names)
    unread = {str(Path(path).relative_to(RESULTS).parent) for path in {*outs} & revision.missing}
    changes = {
        "revisions": [revision.name],
        "candidates": list(names),
        "params": [
            {"candidate": other, **change}
            for other in others
            for change in param_changes(recipes_of(revision, first), recipes_of(revision, other))
        ],
        "causes": [],
        "artifacts": [_compared(revision, first, other, tensors) for other in others],
        "tensors_compared": tensors,
        "verdicts": [],
        "scores": scores,
        "flipped": _flipped((revision,), old.samples, new.samples),
        "uncompared": [other for other in others if other not in scored and not {first, other} & unread],
        "incomparable": incomparable(
            revision, revision, (old.scores, new.scores), [(first, other) for other in others],
            [
                (_on(f"{name}/{suite}"), f"{first}/{suite}", f"{name}/{suite}")
                for name in others
                for suite in suites
            ],
        ),
    }  # fmt: skip
    gap = missing_outputs(revision)
    return {**changes, "missing": [gap] if gap["outputs"] else []}


def artifact_changes(old: Revision, new: Revision, tensors: bool = True) -> list[dict[str, Any]]:
    """Return outputs added, removed or changed; a changed model with its tensors if both are in the cache."""
    rows: list[dict[str, Any]] = []
    for path in sorted(old.outs.keys() | new.outs.keys()):
        if old.hash(path) == new.hash(path):
            continue
        was, now = old.outs.get(path), new.outs.get(path)
        change = "changed" if was and now else "added" if now else "removed"
        row: dict[str, Any] = {"path": path, "change": change}
        row |= {"old_bytes": was and was.get("size"), "new_bytes": now and now.get("size")}
        if change == "changed" and Path(path).is_relative_to(MODELS):
            row |= _tensors((old, path), (new, path), compared=tensors)
        rows.append(row)
    return rows


def _compared(revision: Revision, first: str, other: str, tensors: bool) -> dict[str, Any]:
    """Return how a model differs from another of the same revision."""
    paths = [str(MODELS / name) for name in (first, other)]
    sizes = [revision.outs.get(path, {}).get("size") for path in paths]
    row = {"path": paths[1], "change": f"beside {paths[0]}", "old_bytes": sizes[0], "new_bytes": sizes[1]}
    known = all(path in revision.outs for path in paths)
    sides = [(revision, path) for path in paths]
    return row | (_tensors(*sides, compared=tensors) if known else {})


def _tensors(*sides: tuple[Revision, str], compared: bool) -> dict[str, Any]:
    """Compare two models if asked to; what the cache lacks of them is noted either way."""
    files = [revision.files(path) for revision, path in sides]
    if not compared or any(path in revision.missing for revision, path in sides):
        return {}
    weights = [any(name.endswith(".safetensors") for name in side) for side in files]
    return {"tensors": compare_tensors(*files)} if all(weights) else {}  # a floor has none


def results_to_read(old: Revision, new: Revision) -> list[str]:
    """Return the results that differ, and those that their noise is measured on.

    Results that the cache lacks on either side are left out, or their rows would look added or removed.
    """
    paths = {path for path in old.outs.keys() | new.outs.keys() if Path(path).is_relative_to(RESULTS)}
    differing = {path for path in paths if old.hash(path) != new.hash(path)}
    noisy = {candidate for revision in (old, new) for candidate in _noisy(revision)}
    wanted = differing | (
        {str(RESULTS / candidate / suite) for candidate in noisy for suite in _suites(differing)} & paths
    )
    return _cached(wanted, old, new)


def _cached(wanted: Any, *sides: Revision) -> list[str]:
    """Return those of some outputs that the cache holds for every side; the others are noted as missing."""
    for side in sides:
        for path in {*wanted} & side.outs.keys():
            side.files(path)
    return sorted({*wanted}.difference(*(side.missing for side in sides)))


def _noisy(revision: Revision) -> set[str]:
    """Return the noise candidates and their sources."""
    recipes = revision.params.get("noise", {}).items()
    return {candidate for name, recipe in recipes for candidate in (f"noise/{name}", recipe["source"])}


def _suites(outs: Any) -> list[str]:
    return sorted({Path(path).name for path in outs})


def _on(name: str) -> str:
    candidate, _, suite = name.rpartition("/")
    return f"{candidate} on {suite}"


def _margin(revision: Revision) -> float:
    margin: float = revision.params.get("report", {}).get("margin", _MARGIN)
    return margin


def _as_sides(results: Results, first: str, others: Sequence[str]) -> tuple[Results, Results]:
    """Return the first candidate's rows under the name of each other candidate, and the others' rows."""
    scores, samples = results.scores, results.samples
    bases = dict(zip(scores["candidate"], scores["base"], strict=True))
    reference = [side[side["candidate"] == first] for side in (scores, samples)]
    named = [reference[0].assign(candidate=name, base=bases[name]) for name in others if name in bases]
    old = Results(
        pd.concat(named, ignore_index=True) if named else scores.head(0),
        pd.concat([reference[1].assign(candidate=name) for name in others], ignore_index=True),
    )
    return old, Results(*(side[side["candidate"].isin(others)] for side in (scores, samples)))


def read_results(revision: Revision, outs: list[str]) -> Results:
    """Read some results of a revision; columns that its older tables lack are empty."""
    tables = []
    for name, columns in ((SCORES, SCORE_COLUMNS), (SAMPLES, SAMPLE_COLUMNS)):
        files = [file for out in outs if (file := revision.file(out, name))]
        frames = [pd.read_parquet(file).reindex(columns=list(columns)).astype(columns) for file in files]
        tables.append(pd.concat(frames, ignore_index=True) if frames else table([], columns))
    return Results(*tables)


def read_questions(revisions: Sequence[Revision], suites: Sequence[str]) -> pd.DataFrame:
    """Read what the bases of some revisions were asked, each question once; what the cache lacks is noted."""
    files = [
        file
        for revision in revisions
        for out in revision.outs
        if Path(out).is_relative_to(RESULTS / "base") and Path(out).name in suites
        if (file := revision.file(out, ITEMS, questions=True))
    ]
    frames = [
        pd.read_parquet(file).reindex(columns=list(ITEM_COLUMNS)).astype(ITEM_COLUMNS) for file in files
    ]
    items = pd.concat(frames, ignore_index=True) if frames else table([], ITEM_COLUMNS)
    return items.drop_duplicates(list(ITEM), ignore_index=True)


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


def score_changes(
    old: Results,
    new: Results,
    margin: float = _MARGIN,
    noise: pd.DataFrame | None = None,
    *,
    unchanged: bool = False,
) -> list[dict[str, Any]]:
    """Return scores that differ or that a side lacks, with `label`, `noise`, `p` and `verdict`.

    Each side has its 95 % interval (`old_low`, ...), and the mean change an item has one (`change_low`, ...;
    nats for a perplexity). The verdict is that of `stages.reporting.margins`, missing where there is nothing
    to compare with or nobody asks; it goes by `p_corrected`, over a `family` of that many comparisons.

    Args:
        margin: the largest change that does not matter.
        noise: the score rows that noise is measured on; None: those of both sides.
        unchanged: whether to return scores that do not differ as well.
    """
    if old.scores.empty and new.scores.empty:
        return []
    key = ["candidate", "base", *KEY]
    scores = [with_intervals(side.scores) for side in (old, new)]
    sides = [
        side[[*key, "value", "low", "high"]].rename(
            columns={"value": name, "low": f"{name}_low", "high": f"{name}_high"}
        )
        for side, name in zip(scores, ("old", "new"), strict=True)
    ]
    both = sides[0].merge(sides[1].assign(in_new=True), on=key, how="outer")
    both["in_new"] = both["in_new"].notna()
    same = (both["old"] == both["new"]) | both[["old", "new"]].isna().all(axis=1)
    both = both if unchanged else both[~same]
    noisy = noise_by_measure(*((old.scores, new.scores) if noise is None else (noise,)))
    both = both.merge(noisy, on=["base", *KEY], how="left")
    compared = compare_revisions(old, new, margin, noise)
    compared = compared.rename(columns={"low": "change_low", "high": "change_high"})
    both = both.merge(compared[[*key, *_JUDGED, "change", "change_low", "change_high"]], on=key, how="left")
    both["difference"] = both["new"] - both["old"]
    label = labels(pd.concat([old.scores, new.scores]))
    return [row | {"label": label[measure_of(row)]} for row in records(both)]


def worsened(row: dict[str, Any], verdicts: tuple[str, ...]) -> bool:
    """Tell whether a row of `score_changes` has one of these verdicts, or a score became NaN."""
    lost = row["old"] is not None and row["new"] is None and row["in_new"]
    return row["verdict"] in verdicts or lost


def unsure(changes: dict[str, Any]) -> str:
    """Say what keeps a diff from telling whether scores got worse; empty if nothing does."""
    counts = {gap["revision"]: len(lacking_results(gap)) for gap in changes["missing"]}
    gaps = [f"{count} result(s) of {revision}" for revision, count in counts.items() if count]
    if gaps:
        return f"the cache lacks {' and '.join(gaps)}, so some scores were not compared; add --fetch results."
    if changes["uncompared"]:
        return (
            f"{', '.join(changes['uncompared'])} and {changes['candidates'][0]} have no score in common, so "
            "nothing was compared; `prunequant run` evaluates what evaluate.candidates lists."
        )
    untested = [
        f"{row['candidate']} on {row['suite']}" for row in changes["scores"] if row["verdict"] == "untested"
    ]
    names = ", ".join(dict.fromkeys(untested))
    return f"the sides share no items for {names}, so these scores were not compared." if names else ""


def _flipped(revisions: Sequence[Revision], old: pd.DataFrame, new: pd.DataFrame) -> list[dict[str, Any]]:
    """Return flipped items with their questions, which only the suites of such items are read for."""
    suites = {item["suite"] for item in flipped_items(old, new, table([], ITEM_COLUMNS))}
    return flipped_items(old, new, read_questions(revisions, sorted(suites)))


def flipped_items(old: pd.DataFrame, new: pd.DataFrame, items: pd.DataFrame) -> list[dict[str, Any]]:
    """Return items with the same prompt on both sides that are right on one side only.

    Args:
        items: the questions, by `stages.core.tables.ITEM`; `prompt` and `choices` are None for one without.
    """
    shown = ["target", "difficulty", "response", "score"]
    sides = [
        side[side["target"].notna() & side["score"].isin([0.0, 1.0])][[*_ITEM, *shown]] for side in (old, new)
    ]
    both = sides[0].merge(
        sides[1].drop(columns=["target", "difficulty"]), on=_ITEM, suffixes=("_old", "_new")
    )
    both = both[both["score_old"] != both["score_new"]]
    both["became"] = both["score_new"].map({1.0: "right", 0.0: "wrong"})
    both = both.merge(items[[*ITEM, "prompt", "choices"]], on=list(ITEM), how="left")
    return records(both.drop(columns=["score_old", "score_new", "prompt_hash"]))


def missing_outputs(revision: Revision) -> dict[str, Any]:
    """Return the outputs of a revision that the cache lacks, and which lack for their questions alone."""
    outputs = [
        {
            "path": path, "bytes": revision.outs[path].get("size"), "md5": revision.outs[path]["md5"],
            "questions": path not in revision.missing,
        }
        for path in sorted(revision.missing | revision.unread)
    ]  # fmt: skip
    return {"revision": revision.name, "outputs": outputs}
