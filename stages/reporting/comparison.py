"""Compare every score with that of its reference, and judge whether the difference means anything.

The reference is the dense base of each candidate, or the one candidate that params.yaml names. A difference
is judged item by item (see `stages.reporting.statistics.paired`), beside the noise: how far the score of the
same weights moves when only their arithmetic changes (the `noise` candidates), and that of the same recipe
on other draws of its text (`report.noise`). The words are those of `stages.reporting.margins`. Beside single
scores, all right or wrong answers of the headline metrics are pooled over suites into one decision a
candidate: is this model worse (2602.10144)?
"""

import math
from collections.abc import Callable, Mapping
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
from stages.reporting.judging import Report, repeats_of
from stages.reporting.margins import margin_of, with_verdicts
from stages.reporting.statistics import paired
from stages.reporting.statistics.luck import Luck, luck_of
from stages.reporting.statistics.retention import Retention, retention

HEADLINES = ("perplexity", "acc", "exact_match", "prompt_level_strict_acc", "pass@1")
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
    pooled: pd.DataFrame
    """A row a competing candidate: its answers in all suites, with the columns of `compare_pooled`."""

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

    def at_margin(self, margin: float) -> pd.DataFrame:
        """Return the headline scores of candidates that compete, judged by another margin."""
        rows = self.rows[_is_headline(self.rows) & competes(self.rows)]
        rows = rows.assign(p_same=[_p_same_at(row, margin) for row in records(rows)])
        return with_verdicts(rows, pd.Series(True, index=rows.index), margin)

    def headlines(self) -> list[Measure]:
        """Return the measures that stand for each suite, one a readout, in the order of the suites."""
        return headline_measures(self.rows)


def headline_measures(rows: pd.DataFrame) -> list[Measure]:
    """Return the measures that stand for each suite, one a readout, in the order of the suites."""
    whole = rows[rows["difficulty"] == "all"]
    measures: dict[tuple[str, str], list[Measure]] = {}
    for measure in by_measure(whole):
        named = dict(zip(MEASURE, measure, strict=True))
        measures.setdefault((named["suite"], named["readout"]), []).append(measure)
    suites = list(dict.fromkeys(whole["suite"]))
    return [min(measures[key], key=_rank) for key in sorted(measures, key=lambda key: suites.index(key[0]))]


def _is_headline(rows: pd.DataFrame) -> "pd.Series[bool]":
    """Mark overall scores of headline metrics, at every budget."""
    chosen = {measure[:-1] for measure in headline_measures(rows)}
    known = [measure_of(row)[:-1] in chosen for row in records(rows)]
    return (rows["difficulty"] == "all") & pd.Series(known, index=rows.index, dtype=bool)


def _rank(measure: Measure) -> int:
    metric = measure[MEASURE.index("metric")]
    return HEADLINES.index(metric) if metric in HEADLINES else len(HEADLINES)


def compare_candidates(results: Results, report: Report) -> Comparison:
    """Compare every candidate with its reference, and noise candidates with their source.

    The added columns are missing where there is nothing to compare with:

    - `reference`: the candidate compared with; `reference_value`; `delta`; `delta_stderr`, paired, in the
      score's unit.
    - `pairs`: items that both answered; `lost`, `won`: those with a worse and a better score;
      `answers_changed`.
    - `change`: the mean difference an item; `low`, `high`: its 95 % interval; `p`; `p_same`: that of a
      difference as large as the margin, corrected; `smallest`: the smallest change that the items show.
    - `noise`: the largest |delta| of the base's noise candidates on this measure.
    - `repeated_delta`, `repeated_noise`: the delta over the repeats that `report.noise` names, and the
      half-width of its 95 % interval (`stages.reporting.statistics.luck`).
    - `p_corrected`: p over the family; `family`: its size, 0 for scores that nobody asks about.
    - `retention`, `retention_low`, `retention_high`: the share kept above the score's floor.
    - `verdict`: see `stages.reporting.margins`.
    """
    items = _Items(results)
    scores = results.scores
    noisy = scores[is_noise(scores)]
    references = "base/" + scores["base"] if report.reference is None else report.reference
    of = pd.Series(references, index=scores.index)
    rows = _with_noise(_against(scores, of, items, report.margin), scores)
    rows = _with_repeats(rows, report.noise, items.value)
    kept = [_kept(row, items) for row in records(rows)]
    for column, end in (("retention", "value"), ("retention_low", "low"), ("retention_high", "high")):
        rows[column] = [getattr(share, end, math.nan) for share in kept]
    headline = _is_headline(rows)
    return Comparison(
        with_verdicts(rows, headline & competes(rows), report.margin),
        _against(noisy, noisy["source"], items, report.margin),
        compare_pooled(rows[headline], items, report.margin, report.noise),
    )


def compare_pooled(
    rows: pd.DataFrame, items: "_Items", margin: float, groups: Mapping[str, tuple[str, ...]]
) -> pd.DataFrame:
    """Pool the answers of every candidate over suites and compare them with its reference's, by item.

    An item counts once: the change of an item asked in both readouts is the mean of both.

    Args:
        rows: headline scores, with their references.
        groups: which candidates repeat each other.

    Returns:
        A row a competing candidate: `candidate`, `reference`, `suites` and the columns of a comparison.
    """
    shares = rows[rows["higher_is_better"].astype(bool) & rows["reference"].notna()]
    entries: list[dict[str, Any]] = []
    noise: dict[str, float] = {}
    for candidate, group in shares.groupby("candidate", sort=False):
        noisy = str(candidate).startswith("noise/")
        reference = str(group["source" if noisy else "reference"].iloc[0])
        found = [
            (row["suite"], pairs)
            for row in records(group)
            if (pairs := items.pairs(str(candidate), reference, row)) is not None
            and pairs[["score_ours", "score_base"]].isin([0.0, 1.0]).all(axis=None)
        ]
        if not found:
            continue
        changes = pd.concat(
            pairs.assign(suite=suite, change=pairs["score_ours"] - pairs["score_base"])
            for suite, pairs in found
        ).groupby(["suite", "doc_id", "prompt_hash"])["change"]
        means = changes.mean().tolist()
        base = str(group["base"].iloc[0])
        if noisy:
            noise[base] = max(noise.get(base, 0.0), abs(math.fsum(means) / len(means)))
            continue
        entries.append(
            {
                "candidate": candidate,
                "reference": reference,
                "base": base,
                "suites": len({s for s, _ in found}),
            }
            | {"metric": "answers", "higher_is_better": True}
            | _of_changes(means, margin)
        )
    columns = ["candidate", "reference", "base", "suites", "metric", "higher_is_better", *_CHANGES]
    pooled = pd.DataFrame(entries, columns=columns)
    pooled = pooled[competes(pooled)].reset_index(drop=True)
    pooled["noise"] = pooled["base"].map(noise).astype("float64")
    pooled["delta"] = pooled["change"]
    changes_of = dict(zip(pooled["candidate"], pooled["change"], strict=True))

    def change_of(candidate: str, row: dict[str, Any]) -> float | None:
        return 0.0 if candidate == row["reference"] else changes_of.get(candidate)

    pooled = _with_repeats(pooled, groups, change_of)
    return with_verdicts(pooled, pd.Series(True, index=pooled.index), margin)


def compare_revisions(
    old: Results, new: Results, margin: float, noise: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Compare each score in `new` with the same candidate's in `old`; columns as in `compare_candidates`.

    The family is the headline scores that both have, unchanged ones included.

    Args:
        noise: the score rows that noise is measured on; None: those of both sides.
    """
    renamed = [table.assign(candidate=_BEFORE + table["candidate"]) for table in (old.scores, old.samples)]
    both = Results(pd.concat([renamed[0], new.scores]), pd.concat([renamed[1], new.samples]))
    rows = _against(new.scores, _BEFORE + new.scores["candidate"], _Items(both), margin)
    rows = _with_noise(rows, *((old.scores, new.scores) if noise is None else (noise,)))
    return with_verdicts(rows, _is_headline(rows), margin)


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
            Columns suffixed `_ours` and `_base`; None where the sides share no item of the measure.
        """
        measure = measure_of(row | {"metric": PER_ITEM.get(row["metric"], row["metric"])})
        sides = [self._samples.get(name, {}).get(measure) for name in (ours, reference)]
        if sides[0] is None or sides[1] is None:
            return None
        both = sides[0].merge(sides[1], on=["doc_id", "prompt_hash"], suffixes=("_ours", "_base"))
        level = row["difficulty"]
        asked = both if level == "all" else both[both["difficulty_ours"] == level]
        return asked if len(asked) else None


def _with_noise(rows: pd.DataFrame, *tables: pd.DataFrame) -> pd.DataFrame:
    return rows.merge(noise_by_measure(*tables), on=["base", *KEY], how="left")


def _with_repeats(
    rows: pd.DataFrame,
    groups: Mapping[str, tuple[str, ...]],
    value: Callable[[str, dict[str, Any]], float | None],
) -> pd.DataFrame:
    """Add `repeated_delta` and `repeated_noise`, missing where neither candidate nor reference has repeats.

    Args:
        groups: which candidates repeat each other.
        value: the score of a candidate on the measure of a row.
    """
    lucks = [_luck(row, groups, value) if row["delta"] is not None else None for row in records(rows)]
    return rows.assign(
        repeated_delta=[luck.value if luck else math.nan for luck in lucks],
        repeated_noise=[luck.noise if luck else math.nan for luck in lucks],
    )


def _luck(
    row: dict[str, Any],
    groups: Mapping[str, tuple[str, ...]],
    value: Callable[[str, dict[str, Any]], float | None],
) -> Luck | None:
    ours, theirs = (repeats_of(row[side], groups) for side in ("candidate", "reference"))
    if not ours and not theirs:
        return None
    sides = [
        [value(name, row) for name in group or (row[side],)]
        for group, side in ((ours, "candidate"), (theirs, "reference"))
    ]
    known = [[score for score in scores if score is not None] for scores in sides]
    if list(map(len, known)) != list(map(len, sides)):
        return None
    means = [math.fsum(scores) / len(scores) for scores in known]
    repeated = [scores for scores, group in zip(known, (ours, theirs), strict=True) if group]
    return luck_of(means[0] - means[1], repeated)


def _kept(row: dict[str, Any], items: _Items) -> Retention | None:
    """Return the share kept above the floor of a score that is its items' mean; None where undefined."""
    if row["floor"] is None or row["pairs"] != row["num_items"] or not row["higher_is_better"]:
        return None
    pairs = items.pairs(row["candidate"], row["reference"], row)
    if pairs is None or not math.isclose(pairs["score_ours"].mean(), row["value"], abs_tol=1e-9):
        return None
    return retention(pairs["score_base"].tolist(), pairs["score_ours"].tolist(), row["floor"])


def _against(
    scores: pd.DataFrame, references: "pd.Series[str]", items: _Items, margin: float
) -> pd.DataFrame:
    """Add the columns that compare each row with the same measure of its candidate in `references`."""
    added: list[dict[str, Any]] = []
    for row, reference in zip(records(scores), references, strict=True):
        value = items.value(reference, row)
        if value is None or row["value"] is None or reference == row["candidate"]:
            added.append({})
            continue
        entry = {"reference": reference, "reference_value": value, "delta": row["value"] - value}
        pairs = items.pairs(row["candidate"], reference, row)
        added.append(entry | ({} if pairs is None else _statistics(row, value, pairs, margin)))
    columns = ["reference", "reference_value", "delta", "delta_stderr", "answers_changed", *_CHANGES]
    extra = pd.DataFrame(added, columns=columns, index=scores.index)
    return pd.concat([scores, extra.astype(dict.fromkeys(columns[1:], "float64"))], axis=1)


_CHANGES = ("pairs", "lost", "won", "change", "low", "high", "smallest", "p", "p_same")


def _statistics(
    row: dict[str, Any], reference_value: float, pairs: pd.DataFrame, margin: float
) -> dict[str, Any]:
    old, new = pairs["score_base"].tolist(), pairs["score_ours"].tolist()
    # By the delta method a perplexity's error is the perplexity times the error of its mean nats.
    slopes = (row["value"], reference_value) if row["metric"] in PER_ITEM else (1.0, 1.0)
    of_score = paired.interval([slopes[0] * b - slopes[1] * a for a, b in zip(old, new, strict=True)])
    answers = pairs[["response_ours", "response_base"]].fillna("")
    changes = [b - a for a, b in zip(old, new, strict=True)]
    return {
        "answers_changed": int((answers["response_ours"] != answers["response_base"]).sum()),
        "delta_stderr": of_score.stderr if of_score else math.nan,
        **_of_changes(changes, margin_of(row["metric"], margin), bool(row["higher_is_better"])),
    }


def _of_changes(changes: list[float], margin: float, higher_is_better: bool = True) -> dict[str, Any]:
    """Return the statistics `_CHANGES` of per-item changes, in their unit."""
    lost, won = paired.discordant([0.0] * len(changes), changes, higher_is_better)
    interval = paired.interval(changes)
    same = _p_same(interval, len(changes), lost + won, margin)
    binary = {abs(change) for change in changes} <= {0.0, 1.0}
    return {
        "pairs": len(changes),
        "lost": lost,
        "won": won,
        "change": interval.mean if interval else math.nan,
        "low": interval.low if interval else math.nan,
        "high": interval.high if interval else math.nan,
        "smallest": paired.smallest_shown(changes),
        "p": paired.mcnemar(lost, won) if binary else interval.p if interval else math.nan,
        "p_same": same,
    }


def _p_same(interval: paired.Interval | None, count: int, differing: int, margin: float) -> float:
    """Return the p-value of a difference as large as the margin; missing without statistics."""
    if interval is None:
        return math.nan
    if not differing:  # how likely none of these differs if a share as large as the margin would
        return float((1 - margin) ** count)
    return paired.equivalence(interval, count, -margin, margin)


def _p_same_at(row: dict[str, Any], margin: float) -> float:
    """Return the p-value of a row's difference as large as another margin than that of its comparison."""
    if row["low"] is None:
        return math.nan
    stderr = paired.stderr_of(row["low"], row["high"], int(row["pairs"]))
    interval = paired.Interval(row["change"], stderr, row["low"], row["high"], row["p"])
    differing = int(row["lost"] + row["won"])
    return _p_same(interval, int(row["pairs"]), differing, margin_of(row["metric"], margin))
