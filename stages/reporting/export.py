"""Write the report as files for other tools: parquet for analysis, JSON and CSV for DVC and the terminal."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from stages.core.files import write_json
from stages.core.tables import MEASURE, PARAMETERS_REMOVED
from stages.reporting.collect import Measure, Results, by_measure, measure_of, records
from stages.reporting.comparison import Comparison
from stages.reporting.hypotheses.evidence import Verdict
from stages.reporting.margins import worded
from stages.reporting.measured import Measured
from stages.reporting.verdicts import nested_verdicts
from stages.reporting.words import NEGLIGIBLE, SHARES, family, labels

VERDICTS = "verdicts.json"
MEASURED_VERDICTS = "measured_verdicts.json"
HEADLINE_SCORES = "headlines.csv"
_SIZES = ["sparsity", PARAMETERS_REMOVED, "bits", "bits_per_weight", "bytes_ideal", "bytes_on_disk"]


def write_data(
    folder: Path,
    results: Results,
    comparison: Comparison,
    agreements: pd.DataFrame,
    verdicts: list[Verdict],
    measured: Measured,
    wrong: pd.DataFrame,
) -> None:
    """Write the tables of results, samples and items, the summaries and the two CSV files of `dvc plots`.

    results.parquet has the score rows with the columns that the comparison adds; the summaries are
    headlines.csv, summary.csv, pooled.csv, metrics.json, verdicts.json, agreement.csv, which is `agreements`,
    and wrong.csv, which is `wrong`; and in metrics/ a file a candidate, a row of `dvc metrics show`.
    Measurements and verdicts on them vary from run to run, so they stand apart: profile.csv and
    measured_verdicts.json.
    """
    comparison.rows.to_parquet(folder / "results.parquet", index=False)
    results.samples.to_parquet(folder / "samples.parquet", index=False)
    results.items.to_parquet(folder / "items.parquet", index=False)
    headline_scores(comparison).to_csv(folder / HEADLINE_SCORES, index=False)
    summarize(comparison).to_csv(folder / "summary.csv", index=False)
    agreements.to_csv(folder / "agreement.csv", index=False)
    wrong.to_csv(folder / "wrong.csv", index=False)
    comparison.pooled.to_csv(folder / "pooled.csv", index=False)
    measured.figures.to_csv(folder / "profile.csv", index=False)
    for file, on_measured in ((VERDICTS, False), (MEASURED_VERDICTS, True)):
        chosen = [verdict for verdict in verdicts if verdict.measured == on_measured]
        (folder / file).write_text(json.dumps(nested_verdicts(chosen), indent=2) + "\n")
    (folder / "metrics.json").write_text(json.dumps(nested_metrics(results.scores), indent=2) + "\n")
    for candidate, scores in headline_metrics(comparison).items():
        write_json(folder / "metrics" / f"{candidate}.json", scores)
    for axis in ("on_disk", "ideal"):
        plotted_perplexities(comparison, f"bytes_{axis}").to_csv(folder / f"quality_{axis}.csv", index=False)


def headline_scores(comparison: Comparison) -> pd.DataFrame:
    """Return a line a headline score: all that a reader needs to judge it.

    Columns: `suite`, `label`, `metric`, `higher_is_better`, `candidate`, `value`; `low` and `high`, its 95 %
    interval by Student's t, a share's by Wilson's; `reference`, and `of_reference`, the value divided by
    the reference's; `floor`; `noise`, the largest change by arithmetic alone; `verdict`, and `word`, which is
    it with what the items show; and the sizes.
    """
    rows = comparison.rows[comparison.rows["difficulty"] == "all"]
    label, scores = labels(comparison.rows), by_measure(rows)
    chosen = {measure[:-1] for measure in comparison.headlines()}  # at every budget, which comes last
    lines = [scores[measure].assign(label=label[measure]) for measure in scores if measure[:-1] in chosen]
    table = with_intervals(pd.concat(lines))
    table["of_reference"] = table["value"] / table["reference_value"].replace(0, float("nan"))
    table["word"] = [worded(row) for row in records(table)]
    columns = [
        "suite",
        "label",
        "metric",
        "higher_is_better",
        "candidate",
        "value",
        "low",
        "high",
        "reference",
    ]
    return table[[*columns, "of_reference", "floor", "noise", "verdict", "word", *_SIZES]]


def with_intervals(scores: pd.DataFrame) -> pd.DataFrame:
    """Add `low` and `high`, the 95 % interval of each score: Student's t, and Wilson's for a share."""
    count = scores["num_items"].astype("float64")
    reach = scores["stderr"] * stats.t.ppf(0.975, (count - 1).clip(lower=1))
    table = scores.assign(low=scores["value"] - reach, high=scores["value"] + reach)
    share = table["metric"].isin(SHARES)
    table.loc[share, ["low", "high"]] = wilson(scores["value"], scores["stderr"], count)[share]
    return table


def wilson(share: pd.Series, stderr: pd.Series, count: pd.Series) -> pd.DataFrame:
    """Return Wilson's 95 % interval of shares, `low` and `high`.

    The plain interval of 0 of 120 right answers is 0 to 0. Wilson's is 0 to .03, as the truth may be above 0.
    Items that count in parts, or come in groups, count as the number of right and wrong answers that would
    have the same standard error.

    Args:
        count: of items, taken where the standard error is 0 or unknown.
    """
    spread = share * (1 - share)
    equal = (spread / stderr**2).where(spread * stderr > 0, count)
    z2 = float(stats.norm.ppf(0.975)) ** 2
    middle, reach = share + z2 / (2 * equal), ((spread + z2 / (4 * equal)) * z2 / equal) ** 0.5
    ends = {"low": (middle - reach) / (1 + z2 / equal), "high": (middle + reach) / (1 + z2 / equal)}
    return pd.DataFrame(ends).clip(0, 1)


def summarize(comparison: Comparison) -> pd.DataFrame:
    """Return a line a candidate: its sizes and each suite's headline scores, as `<suite>.<label>`.

    Where parts are removed and nothing else is zero, `parameters_removed` stands in place of `sparsity`; it
    is left out where no candidate lacks parameters.
    """
    rows = comparison.rows
    lines = rows.drop_duplicates("candidate").set_index("candidate")[_SIZES].copy()
    smaller = lines[PARAMETERS_REMOVED].fillna(0) > NEGLIGIBLE
    lines["sparsity"] = lines["sparsity"].mask(smaller & (lines["sparsity"] < NEGLIGIBLE))
    if not smaller.any():
        lines = lines.drop(columns=PARAMETERS_REMOVED)
    scores, label = by_measure(rows[rows["difficulty"] == "all"]), labels(rows)
    for measure in comparison.headlines():
        suite = measure[MEASURE.index("suite")]
        values = scores[measure].set_index("candidate")["value"]
        lines[f"{suite}.{label[measure]}"] = values.reindex(lines.index)
    return lines.reset_index()


def headline_metrics(comparison: Comparison) -> dict[str, dict[str, float | None]]:
    """Return the headline scores as `{candidate: {column: value}}`, null where not finite.

    Keep the table of `dvc metrics show` narrow: columns have short names (see `_columns`), and values five
    digits. metrics.json has all digits.
    """
    rows = comparison.rows
    scores, label = by_measure(rows[rows["difficulty"] == "all"]), labels(rows)
    by_candidate: dict[str, dict[str, float | None]] = {str(name): {} for name in rows["candidate"].unique()}
    for measure, column in _columns(comparison.headlines(), label).items():
        for row in records(scores[measure]):
            value = _finite(row["value"])
            by_candidate[row["candidate"]][column] = None if value is None else float(f"{value:.5g}")
    return by_candidate


def _columns(headlines: list[Measure], label: Mapping[Measure, str]) -> dict[Measure, str]:
    """Name each measure by its suite, or else its label, if no other measure has that; or else by both."""
    words = {measure: (str(measure[MEASURE.index("suite")]), label[measure]) for measure in headlines}
    shared = Counter(word for pair in words.values() for word in set(pair))
    return {
        measure: next((word for word in pair if shared[word] == 1), ".".join(pair))
        for measure, pair in words.items()
    }


def nested_metrics(scores: pd.DataFrame) -> dict[str, Any]:
    """Return the overall scores as `{candidate: {suite: {label: value}}}`, null where not finite."""
    label = labels(scores)
    nested: dict[str, Any] = {}
    for row in records(scores[scores["difficulty"] == "all"]):
        suite = nested.setdefault(row["candidate"], {}).setdefault(row["suite"], {})
        suite[label[measure_of(row)]] = _finite(row["value"])
    return nested


def _finite(value: float | None) -> float | None:
    """Return a number that JSON has, which NaN and infinity are not."""
    return value if value is not None and math.isfinite(value) else None


def plotted_perplexities(comparison: Comparison, size: str) -> pd.DataFrame:
    """Return finite perplexities against `size` in megabytes (10^6 bytes), a row a candidate and suite."""
    rows, _ = comparison.perplexities
    points = rows[["candidate", "suite"]].copy()
    points["family"] = [family(row) for row in records(rows)]
    points["megabytes"] = rows[size].astype("float64") / 1e6
    points["perplexity"] = rows["value"]
    return points.sort_values(["suite", "megabytes", "candidate"], kind="stable")
