"""Write the report as files for other tools: parquet for analysis, JSON and CSV for DVC and the terminal."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from stages.core.files import write_json
from stages.core.tables import MEASURE
from stages.reporting.collect import Results, by_measure, measure_of, records
from stages.reporting.comparison import Comparison
from stages.reporting.hypotheses.evidence import Verdict
from stages.reporting.verdicts import nested_verdicts
from stages.reporting.words import family, labels

VERDICTS = "verdicts.json"
_SIZES = ["sparsity", "bits", "bits_per_weight", "bytes_ideal", "bytes_on_disk"]


def write_data(
    folder: Path,
    results: Results,
    comparison: Comparison,
    agreements: pd.DataFrame,
    verdicts: list[Verdict],
) -> None:
    """Write results.parquet, samples.parquet, the summaries and the two CSV files of `dvc plots`.

    results.parquet has the score rows with the columns that the comparison adds; the summaries are
    summary.csv, pooled.csv, metrics.json, verdicts.json and agreement.csv, which is `agreements`; and in
    metrics/ a file a candidate, which `dvc metrics show` makes a row of.
    """
    comparison.rows.to_parquet(folder / "results.parquet", index=False)
    results.samples.to_parquet(folder / "samples.parquet", index=False)
    summarize(comparison).to_csv(folder / "summary.csv", index=False)
    agreements.to_csv(folder / "agreement.csv", index=False)
    comparison.pooled.to_csv(folder / "pooled.csv", index=False)
    (folder / VERDICTS).write_text(json.dumps(nested_verdicts(verdicts), indent=2) + "\n")
    (folder / "metrics.json").write_text(json.dumps(nested_metrics(results.scores), indent=2) + "\n")
    for candidate, scores in headline_metrics(comparison).items():
        write_json(folder / "metrics" / f"{candidate}.json", scores)
    for axis in ("on_disk", "ideal"):
        plotted_perplexities(comparison, f"bytes_{axis}").to_csv(folder / f"quality_{axis}.csv", index=False)


def summarize(comparison: Comparison) -> pd.DataFrame:
    """Return a line a candidate: its sizes and each suite's headline scores, as `<suite>.<label>`."""
    rows = comparison.rows
    lines = rows.drop_duplicates("candidate").set_index("candidate")[_SIZES].copy()
    scores, label = by_measure(rows[rows["difficulty"] == "all"]), labels(rows)
    for measure in comparison.headlines():
        suite = measure[MEASURE.index("suite")]
        values = scores[measure].set_index("candidate")["value"]
        lines[f"{suite}.{label[measure]}"] = values.reindex(lines.index)
    return lines.reset_index()


def headline_metrics(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Return the headline scores as `{candidate: {suite: value}}`, null where not finite.

    A suite with several has `{suite: {label: value}}`. Names are short, as each becomes the head of a column.
    """
    rows = comparison.rows
    scores, label = by_measure(rows[rows["difficulty"] == "all"]), labels(rows)
    headlines = [(measure[MEASURE.index("suite")], measure) for measure in comparison.headlines()]
    shared = {suite for suite, measure in headlines if [other for other, _ in headlines].count(suite) > 1}
    found: dict[str, dict[str, Any]] = {str(candidate): {} for candidate in rows["candidate"].unique()}
    for suite, measure in headlines:
        for row in records(scores[measure]):
            value = row["value"] if row["value"] is not None and math.isfinite(row["value"]) else None
            at = found[row["candidate"]]
            if suite in shared:
                at.setdefault(suite, {})[label[measure]] = value
            else:
                at[suite] = value
    return found


def nested_metrics(scores: pd.DataFrame) -> dict[str, Any]:
    """Return the overall scores as `{candidate: {suite: {label: value}}}`, null where not finite."""
    label = labels(scores)
    nested: dict[str, Any] = {}
    for row in records(scores[scores["difficulty"] == "all"]):
        suite = nested.setdefault(row["candidate"], {}).setdefault(row["suite"], {})
        value = row["value"]  # JSON has neither NaN nor infinity
        suite[label[measure_of(row)]] = value if value is not None and math.isfinite(value) else None
    return nested


def plotted_perplexities(comparison: Comparison, size: str) -> pd.DataFrame:
    """Return finite perplexities against `size` in megabytes (10^6 bytes), a row a candidate and suite."""
    rows, _ = comparison.perplexities
    points = rows[["candidate", "suite"]].copy()
    points["family"] = [family(row) for row in records(rows)]
    points["megabytes"] = rows[size].astype("float64") / 1e6
    points["perplexity"] = rows["value"]
    return points.sort_values(["suite", "megabytes", "candidate"], kind="stable")
