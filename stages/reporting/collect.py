"""Reading the results that params name into two tables, in the order params name them.

`data/results/<candidate>/<suite>` holds one evaluation (see `stages.core.tables`). A missing one is a
mistake of whoever runs the stage by hand, as DVC runs evaluations first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from stages.core.errors import Refusal
from stages.core.files import RESULTS
from stages.core.tables import SAMPLES, SCORES

KEY = ["suite", "task", "readout", "metric", "difficulty"]
"""What makes two scores the same measure."""


@dataclass(frozen=True)
class Results:
    """All rows of a comparison: `scores`, one a score; `samples`, one an item; both tidy."""

    scores: pd.DataFrame
    samples: pd.DataFrame

    @property
    def candidates(self) -> list[str]:
        """Candidates in the order of params."""
        return list(dict.fromkeys(self.scores["candidate"]))

    @property
    def suites(self) -> list[str]:
        """Suites in the order of params."""
        return list(dict.fromkeys(self.scores["suite"]))


def collect(
    evaluations: Sequence[str], candidates: Sequence[str], suites: Sequence[str], root: Path = RESULTS
) -> Results:
    """Read the tables of exactly `evaluations`, each `<candidate>/<suite>`.

    Args:
        candidates: their order in the tables.
        suites: the order of suites within a candidate.

    Raises:
        Refusal: there are no evaluations, or some have no results; every missing one is listed.
        ValueError: a candidate has two scores of one measure; a bug of the evaluation.
    """
    if not evaluations:
        raise Refusal("params.yaml names no suite, so there is nothing to report; add one under suites.")
    missing = [
        name for name in evaluations if not all((root / name / file).exists() for file in (SCORES, SAMPLES))
    ]
    if missing:
        listed = "\n".join(f"  - {name}" for name in missing)
        raise Refusal(
            f"{len(missing)} of {len(evaluations)} results that params.yaml names are missing from {root}; "
            f"`dvc repro` makes them:\n{listed}"
        )
    order = {name: place for place, name in enumerate(f"{c}/{s}" for c in candidates for s in suites)}
    ordered = sorted(evaluations, key=order.__getitem__)
    scores, samples = (
        pd.concat([pd.read_parquet(root / name / file) for name in ordered], ignore_index=True)
        for file in (SCORES, SAMPLES)
    )
    if (twice := scores[scores.duplicated(["candidate", *KEY])]).size:
        raise ValueError(f"scores given twice: {twice[['candidate', *KEY]].to_dict('records')}")
    return Results(scores, samples)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as dicts, a missing value as None."""
    return [
        {str(name): None if value is pd.NA or value != value else value for name, value in row.items()}
        for row in frame.to_dict("records")
    ]


def is_noise(rows: pd.DataFrame) -> "pd.Series[bool]":
    """Which rows are of a candidate that is another one at another batch size or in another dtype."""
    return rows["candidate"].str.startswith("noise/")


def competes(rows: pd.DataFrame) -> "pd.Series[bool]":
    """Which rows are of a model that competes: no measure of noise, and no responder that knows nothing."""
    return ~rows["candidate"].str.startswith(("noise/", "floor/"))


def noise_floor(*tables: pd.DataFrame) -> "pd.Series[float]":
    """How far each measure of a base moved when only batch size or dtype did, by `base` and `KEY`.

    The largest |difference| of a `noise/` candidate from its source, over all of `tables` (score rows of
    one revision each).
    """
    moved = []
    for scores in tables:
        noise = scores[is_noise(scores)]
        source = noise["lineage"].str.split(" > ").str[-2].astype(scores["candidate"].dtype)
        pairs = noise.assign(candidate=source).merge(
            scores, on=["candidate", "base", *KEY], suffixes=("", "_source")
        )
        moved.append(pairs.assign(floor=(pairs["value"] - pairs["value_source"]).abs()))
    return pd.concat(moved).groupby(["base", *KEY], dropna=False)["floor"].max().rename("noise_floor")
