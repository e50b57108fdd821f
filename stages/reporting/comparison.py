"""Compare every score with that of its dense base, and judge whether the difference means anything.

A difference counts only if it passes two tests. It must exceed the noise: how far the score of the same
weights moves when only batch size or dtype changes (the `noise` candidates). And it must be more than luck
over these items (see `stages.reporting.statistics.paired`) although many comparisons are made at once: its
p-value is corrected over its whole family (see `stages.reporting.statistics.holm`). The overall scores of
all candidates that compete are one family, their scores at single levels of difficulty another.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from stages.core.tables import MEASURE
from stages.reporting.collect import (
    KEY,
    Measure,
    Results,
    by_measure,
    competes,
    is_noise,
    measure_of,
    noise_by_measure,
    records,
)
from stages.reporting.statistics import paired
from stages.reporting.statistics.holm import holm
from stages.reporting.statistics.retention import Retention, retention

HEADLINES = ("perplexity", "acc", "exact_match", "prompt_level_strict_acc")
"""Metrics that stand for their suite and readout, the best first; without any, the first metric does."""
PER_ITEM = {"perplexity": "nats_per_token"}
"""The metric of the sample rows behind a score, where it is not the score's own."""
_BEFORE = "before/"


@dataclass(frozen=True)
class Comparison:
    """All scores beside those that they are compared with."""

    rows: pd.DataFrame
    """All score rows, with the columns of `compare_candidates`."""
    noise: pd.DataFrame
    """The rows of noise candidates, compared with their source."""

    @property
    def competitors(self) -> pd.DataFrame:
        """The rows of candidates that compete (see `stages.reporting.collect.competes`)."""
        return self.rows[competes(self.rows)]

    @property
    def perplexities(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Competitors' overall perplexities: the finite ones, which can be drawn, and the others."""
        rows = self.competitors
        rows = rows[(rows["metric"] == "perplexity") & (rows["difficulty"] == "all")]
        finite = np.isfinite(rows["value"].astype("float64"))
        return rows[finite], rows[~finite]

    def headlines(self) -> list[Measure]:
        """Return the measures that stand for each suite, one a readout, in the order of the suites."""
        whole = self.rows[self.rows["difficulty"] == "all"]
        measures: dict[tuple[str, str], list[Measure]] = {}
        for measure in by_measure(whole):
            named = dict(zip(MEASURE, measure, strict=True))
            measures.setdefault((named["suite"], named["readout"]), []).append(measure)
        suites = list(dict.fromkeys(whole["suite"]))
        return [
            min(measures[key], key=_rank) for key in sorted(measures, key=lambda key: suites.index(key[0]))
        ]


def _rank(measure: Measure) -> int:
    metric = measure[MEASURE.index("metric")]
    return HEADLINES.index(metric) if metric in HEADLINES else len(HEADLINES)


def compare_candidates(results: Results) -> Comparison:
    """Compare every candidate with its dense base, `base/<base>`, and noise candidates with their source.

    The added columns are missing where there is nothing to compare with:

    - `reference`: the candidate compared with; `reference_value`; `delta`; `delta_stderr`, paired, in the
      score's unit.
    - `pairs`: items that both answered; `lost`, `won`: those with a worse and a better score;
      `answers_changed`.
    - `low`, `high`: the 95 % interval of the mean difference an item; `p`.
    - `noise`: the largest |delta| of the base's noise candidates on this measure.
    - `p_corrected`: p over the family; `family`: its size, 0 for candidates that do not compete.
    - `retention`, `retention_low`, `retention_high`: the share kept above the score's floor.
    - `verdict`: see `_verdict`.
    """
    items = _Items(results)
    scores = results.scores
    noisy = scores[is_noise(scores)]
    rows = _with_noise(_against(scores, "base/" + scores["base"], items), scores)
    kept = [_kept(row, items) for row in records(rows)]
    for column, end in (("retention", "value"), ("retention_low", "low"), ("retention_high", "high")):
        rows[column] = [getattr(share, end, math.nan) for share in kept]
    return Comparison(_judged(rows, competes(rows)), _against(noisy, noisy["source"], items))


def compare_revisions(old: Results, new: Results) -> pd.DataFrame:
    """Compare each score in `new` with the same candidate's in `old`; columns as in `compare_candidates`.

    Families are formed as there, over all scores that both have, unchanged ones included.
    """
    renamed = [table.assign(candidate=_BEFORE + table["candidate"]) for table in (old.scores, old.samples)]
    both = Results(pd.concat([renamed[0], new.scores]), pd.concat([renamed[1], new.samples]))
    rows = _against(new.scores, _BEFORE + new.scores["candidate"], _Items(both))
    rows = _with_noise(rows, old.scores, new.scores)
    return _judged(rows, pd.Series(True, index=rows.index))


class _Items:
    """Look up scores, and the sample rows behind them, by candidate and measure."""

    def __init__(self, results: Results) -> None:
        self._values = {
            (row["candidate"], row["difficulty"], measure_of(row)): row["value"]
            for row in records(results.scores[["candidate", *KEY, "value"]])
        }
        items = results.samples[results.samples["draw"].isna()]
        self._samples = {
            candidate: by_measure(rows) for candidate, rows in items.groupby("candidate", sort=False)
        }

    def value(self, candidate: str, row: dict[str, Any]) -> float | None:
        """Return a candidate's score of the measure and difficulty of `row`; None where missing."""
        value: float | None = self._values.get((candidate, row["difficulty"], measure_of(row)))
        return value

    def pairs(self, ours: str, reference: str, row: dict[str, Any]) -> pd.DataFrame | None:
        """Join the items behind `row` that both answered, by the very same prompt.

        Returns:
            Columns suffixed `_ours` and `_base`; None where a side has no items of the measure.
        """
        measure = measure_of(row | {"metric": PER_ITEM.get(row["metric"], row["metric"])})
        sides = [self._samples.get(name, {}).get(measure) for name in (ours, reference)]
        if sides[0] is None or sides[1] is None:
            return None
        both = sides[0].merge(sides[1], on=["doc_id", "prompt_hash"], suffixes=("_ours", "_base"))
        level = row["difficulty"]
        return both if level == "all" else both[both["difficulty_ours"] == level]


def _with_noise(rows: pd.DataFrame, *tables: pd.DataFrame) -> pd.DataFrame:
    return rows.merge(noise_by_measure(*tables), on=["base", *KEY], how="left")


def _judged(rows: pd.DataFrame, judged: "pd.Series[bool]") -> pd.DataFrame:
    """Add `p_corrected`, `family` and `verdict`; only rows marked in `judged` are in a family."""
    rows = rows.assign(p_corrected=math.nan, family=0)
    tested, whole = judged & rows["p"].notna(), rows["difficulty"] == "all"
    for family in (tested & whole, tested & ~whole):
        rows.loc[family, "p_corrected"] = holm(rows.loc[family, "p"].tolist())
        rows.loc[family, "family"] = int(family.sum())
    return rows.assign(verdict=[_verdict(row) for row in records(rows)])


def _kept(row: dict[str, Any], items: _Items) -> Retention | None:
    """Return the share kept above the floor of a score that is its items' mean; None where undefined."""
    if row["floor"] is None or row["pairs"] != row["num_items"] or not row["higher_is_better"]:
        return None
    pairs = items.pairs(row["candidate"], row["reference"], row)
    if pairs is None or not math.isclose(pairs["score_ours"].mean(), row["value"], abs_tol=1e-9):
        return None
    return retention(pairs["score_base"].tolist(), pairs["score_ours"].tolist(), row["floor"])


def _against(scores: pd.DataFrame, references: "pd.Series[str]", items: _Items) -> pd.DataFrame:
    """Add the columns that compare each row with the same measure of its candidate in `references`."""
    added: list[dict[str, Any]] = []
    for row, reference in zip(records(scores), references, strict=True):
        value = items.value(reference, row)
        if value is None or row["value"] is None or reference == row["candidate"]:
            added.append({})
            continue
        entry = {"reference": reference, "reference_value": value, "delta": row["value"] - value}
        pairs = items.pairs(row["candidate"], reference, row)
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
    # By the delta method a perplexity's error is the perplexity times the error of its mean nats.
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
    """Return "" (nothing to compare with), identical, within noise, untested, better or worse."""
    if row["delta"] is None:
        return ""
    if row["delta"] == 0 and row["lost"] == row["won"] == 0:
        return "identical"
    if row["noise"] is not None and abs(row["delta"]) <= row["noise"]:
        return "within noise"
    if row["p_corrected"] is None:
        return "untested"
    if row["p_corrected"] > paired.LEVEL:
        return "within noise"
    return "better" if (row["delta"] > 0) == bool(row["higher_is_better"]) else "worse"
