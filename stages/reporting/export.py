"""The report as files for other tools: parquet for analysis, JSON and CSV for DVC and the terminal."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from stages.reporting.collect import Results, records
from stages.reporting.comparison import Comparison
from stages.reporting.words import family

SIZES = ["sparsity", "bits", "bits_per_weight", "bytes_ideal", "bytes_on_disk"]


def write(folder: Path, results: Results, comparison: Comparison, alike: pd.DataFrame) -> None:
    """Write results.parquet, samples.parquet, three summaries and the two CSVs of `dvc plots`.

    results.parquet has the score rows with all that the comparison adds to them; the summaries are
    summary.csv, metrics.json and agreement.csv, which is `alike`.
    """
    comparison.rows.to_parquet(folder / "results.parquet", index=False)
    results.samples.to_parquet(folder / "samples.parquet", index=False)
    summary(comparison).to_csv(folder / "summary.csv", index=False)
    alike.to_csv(folder / "agreement.csv", index=False)
    (folder / "metrics.json").write_text(json.dumps(metrics(results.scores), indent=2) + "\n")
    for axis in ("on_disk", "ideal"):
        quality(comparison, f"bytes_{axis}").to_csv(folder / f"quality_{axis}.csv", index=False)


def summary(comparison: Comparison) -> pd.DataFrame:
    """One line a candidate: its sizes and each suite's headline metrics, as `<suite>.<metric>`."""
    rows = comparison.rows
    lines = rows.drop_duplicates("candidate").set_index("candidate")[SIZES].copy()
    for suite, readout, metric in comparison.headlines():
        chosen = of_measure(rows, suite, readout, metric)
        lines[f"{suite}.{metric}"] = chosen.set_index("candidate")["value"].reindex(lines.index)
    return lines.reset_index()


def of_measure(rows: pd.DataFrame, suite: str, readout: str, metric: str) -> pd.DataFrame:
    """The overall scores of one measure, one row a candidate."""
    named = (rows["suite"] == suite) & (rows["readout"] == readout) & (rows["metric"] == metric)
    return rows[named & (rows["difficulty"] == "all")]


def metrics(scores: pd.DataFrame) -> dict[str, Any]:
    """Overall scores as `{candidate: {suite: {metric: value}}}`."""
    nested: dict[str, Any] = {}
    for row in records(scores[scores["difficulty"] == "all"]):
        suite = nested.setdefault(str(row["candidate"]), {}).setdefault(str(row["suite"]), {})
        value = row["value"]  # JSON knows neither NaN nor infinity
        suite[str(row["metric"])] = value if value is not None and math.isfinite(value) else None
    return nested


def quality(comparison: Comparison, size: str) -> pd.DataFrame:
    """Perplexity of each text suite against `size` in megabytes (10^6 bytes), a row a candidate and suite.

    A perplexity that is no finite number has no place on a plot.
    """
    rows, _ = comparison.perplexities
    made = rows[["candidate", "suite"]].copy()
    made["family"] = [family(row) for row in records(rows)]
    made["megabytes"] = rows[size].astype("float64") / 1e6
    made["perplexity"] = rows["value"]
    return made.sort_values(["suite", "megabytes", "candidate"], kind="stable")
