"""Every score beside its dense base's, and whether the difference means anything.

A difference is told as more than noise only if it passes two tests. It must exceed the noise floor: how
far the score of the same weights moved when only batch size or dtype changed (the `noise` candidates). And it
must be more than luck over these items (see `stages.reporting.statistics.paired`), though many comparisons are made at
once: its p-value is corrected over all of its family (see `stages.reporting.statistics.holm`). The overall scores of all
candidates that compete are one family, those of single levels of difficulty another.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from stages.reporting.collect import KEY, Results, competes, is_noise, noise_floor, records
from stages.reporting.statistics import paired
from stages.reporting.statistics.holm import holm
from stages.reporting.statistics.retention import Retention, retention

HEADLINES = ("perplexity", "acc", "exact_match", "prompt_level_strict_acc")
"""Metrics that stand for their suite, the first one found; a graded suite has one a readout."""
PER_ITEM = {"perplexity": "nats_per_token"}
"""The metric of a sample row that a score's metric is computed from, where the two differ."""

Measure = tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """`rows`: every score row with the columns `Row` adds; `noise`: the same of noise against its source."""

    rows: pd.DataFrame
    noise: pd.DataFrame

    @property
    def competitors(self) -> pd.DataFrame:
        """Rows of candidates that compete (see `stages.reporting.collect.competes`)."""
        return self.rows[competes(self.rows)]

    @property
    def perplexities(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Competitors' overall perplexities: those to draw, and those that are no finite number."""
        rows = self.competitors
        rows = rows[(rows["metric"] == "perplexity") & (rows["difficulty"] == "all")]
        drawn = np.isfinite(rows["value"].astype("float64"))
        return rows[drawn], rows[~drawn]

    def headlines(self) -> list[Measure]:
        """The measures (`suite`, `readout`, `metric`) that stand for each suite, in order."""
        whole = self.rows[self.rows["difficulty"] == "all"]
        found: list[Measure] = []
        for (suite, _), rows in whole.groupby(["suite", "readout"], sort=False):
            metrics = list(dict.fromkeys(rows["metric"]))
            plain = [metric.split(" (")[0] for metric in metrics]
            chosen = next((metrics[plain.index(name)] for name in HEADLINES if name in plain), metrics[0])
            found.append((str(suite), str(rows["readout"].iloc[0]), chosen))
        return sorted(found, key=lambda measure: list(dict.fromkeys(whole["suite"])).index(measure[0]))


def compare(results: Results) -> Comparison:
    """Compare every candidate with the dense base it descends from, and noise with its source.

    Added columns: `reference` (the candidate compared with), `reference_value`, `delta`, `delta_stderr`
    (paired, in the score's unit), `pairs` (items both answered), `lost` and `won` (items whose score got
    worse and better), `answers_changed`, `low` and `high` (95 % interval of the mean difference an item),
    `p`, `floor_noise` (largest |delta| of the noise candidates of this base and measure), `p_corrected` (over
    the family), `family` (how many comparisons it has), `retention` with `retention_low` and
    `retention_high` (share kept above the score's floor) and `verdict`. Missing where there is nothing to
    compare with; candidates that do not compete are in no family.
    """
    lookup = _Items(results)
    scores = results.scores
    lineages = {c: line.split(" > ") for c, line in zip(scores["candidate"], scores["lineage"], strict=True)}
    noisy = scores[is_noise(scores)]
    noise = _against(noisy, {c: lineages[c][-2] for c in noisy["candidate"]}, lookup)
    rows = _against(scores, {c: lineages[c][0] for c in scores["candidate"]}, lookup)
    keys = pd.MultiIndex.from_frame(rows[["base", *KEY]])
    rows["floor_noise"] = noise_floor(scores).reindex(keys).to_numpy(dtype="float64")
    kept = [_kept(row, lookup) for row in records(rows)]
    for name, end in (("retention", "value"), ("retention_low", "low"), ("retention_high", "high")):
        rows[name] = [getattr(one, end, math.nan) for one in kept]
    return Comparison(_judged(rows, competes(rows)), noise)


def between(old: Results, new: Results) -> pd.DataFrame:
    """The score rows of `new` beside the same candidate's in `old`: `delta`, `p` and so on, and `verdict`.

    All scores that both have are compared, unchanged ones as well, in families as in `compare`.
    """
    before = "before/"
    renamed = [table.assign(candidate=before + table["candidate"]) for table in (old.scores, old.samples)]
    both = Results(pd.concat([renamed[0], new.scores]), pd.concat([renamed[1], new.samples]))
    rows = _against(new.scores, {name: before + name for name in new.candidates}, _Items(both))
    keys = pd.MultiIndex.from_frame(rows[["base", *KEY]])
    rows["floor_noise"] = noise_floor(old.scores, new.scores).reindex(keys).to_numpy(dtype="float64")
    return _judged(rows, pd.Series(True, index=rows.index))


class _Items:
    """Scores and sample rows by candidate and measure."""

    def __init__(self, results: Results) -> None:
        self.values: dict[Any, float] = results.scores.set_index(["candidate", *KEY])["value"].to_dict()
        self.samples: dict[Any, pd.DataFrame] = dict(
            iter(results.samples.groupby(["candidate", *KEY[:-1]], sort=False))
        )

    def pairs(self, ours: str, reference: str, measure: Measure) -> pd.DataFrame | None:
        """Items both answered, the same prompt to the last byte; columns suffixed `_ours`, `_base`."""
        suite, task, readout, metric, level = measure
        key = (suite, task, readout, PER_ITEM.get(metric, metric))
        found = [self.samples.get((candidate, *key)) for candidate in (ours, reference)]
        if found[0] is None or found[1] is None:
            return None
        both = found[0].merge(found[1], on=["doc_id", "prompt_hash"], suffixes=("_ours", "_base"))
        return both if level == "all" else both[both["difficulty_ours"] == level]


def _judged(rows: pd.DataFrame, judged: "pd.Series[bool]") -> pd.DataFrame:
    """`rows` with `p_corrected`, `family` and `verdict`; only those `judged` are in a family."""
    rows = rows.assign(p_corrected=math.nan, family=0)
    tested, whole = judged & rows["p"].notna(), rows["difficulty"] == "all"
    for family in (tested & whole, tested & ~whole):
        rows.loc[family, "p_corrected"] = holm(rows.loc[family, "p"].tolist())
        rows.loc[family, "family"] = int(family.sum())
    return rows.assign(verdict=[_verdict(row) for row in records(rows)])


def _kept(row: dict[str, Any], items: _Items) -> Retention | None:
    """What is kept above the floor, of a score that is the mean of its items; None where undefined."""
    if row["floor"] is None or row["pairs"] != row["num_items"] or not row["higher_is_better"]:
        return None
    pairs = items.pairs(row["candidate"], row["reference"], tuple(str(row[name]) for name in KEY))
    if pairs is None or not math.isclose(pairs["score_ours"].mean(), row["value"], abs_tol=1e-9):
        return None
    return retention(pairs["score_base"].tolist(), pairs["score_ours"].tolist(), row["floor"])


def _against(scores: pd.DataFrame, references: dict[str, str], items: _Items) -> pd.DataFrame:
    added: list[dict[str, Any]] = []
    for row in records(scores):
        ours, reference = str(row["candidate"]), references[str(row["candidate"])]
        measure = tuple(str(row[name]) for name in KEY)
        value = items.values.get((reference, *measure))
        if value is None or row["value"] is None or math.isnan(value) or reference == ours:
            added.append({})
            continue
        entry: dict[str, Any] = {
            "reference": reference,
            "reference_value": value,
            "delta": row["value"] - value,
        }
        pairs = items.pairs(ours, reference, measure)
        added.append(entry | (_statistics(row, value, pairs) if pairs is not None and len(pairs) else {}))
    columns = [
        "reference", "reference_value", "delta", "delta_stderr", "pairs", "lost", "won", "answers_changed",
        "low", "high", "p",
    ]  # fmt: skip
    extra = pd.DataFrame(added, columns=columns, index=scores.index)
    return pd.concat([scores, extra.astype(dict.fromkeys(columns[1:], "float64"))], axis=1)


def _statistics(row: dict[str, Any], reference_value: float, pairs: pd.DataFrame) -> dict[str, Any]:
    old, new = pairs["score_base"].tolist(), pairs["score_ours"].tolist()
    both = list(zip(old, new, strict=True))
    lost, won = paired.discordant(old, new, bool(row["higher_is_better"]))
    per_item = paired.interval([b - a for a, b in both])
    # The error of a perplexity is its own slope times that of its mean nats; other scores are means.
    slopes = (row["value"], reference_value) if row["metric"] in PER_ITEM else (1.0, 1.0)
    of_score = paired.interval([slopes[0] * b - slopes[1] * a for a, b in both])
    binary = {*old, *new} <= {0.0, 1.0} and row["metric"] not in PER_ITEM
    answers = pairs[["response_ours", "response_base"]].fillna("")
    return {
        "pairs": len(pairs),
        "lost": lost,
        "won": won,
        "answers_changed": int((answers["response_ours"] != answers["response_base"]).sum()),
        "delta_stderr": of_score.stderr if of_score else math.nan,
        "low": per_item.low if per_item else math.nan,
        "high": per_item.high if per_item else math.nan,
        "p": paired.mcnemar(lost, won) if binary else per_item.p if per_item else math.nan,
    }


def _verdict(row: dict[str, Any]) -> str:
    """One of: "" (nothing to compare with), identical, within noise, untested, better, worse."""
    if pd.isna(row["delta"]):
        return ""
    if row["delta"] == 0 and row["lost"] == row["won"] == 0:
        return "identical"
    if not pd.isna(row["floor_noise"]) and abs(row["delta"]) <= row["floor_noise"]:
        return "within noise"
    if pd.isna(row["p_corrected"]):
        return "untested"
    if row["p_corrected"] > paired.LEVEL:
        return "within noise"
    return "better" if (row["delta"] > 0) == bool(row["higher_is_better"]) else "worse"
