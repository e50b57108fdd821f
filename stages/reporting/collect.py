"""Read the results that params.yaml names into two tables, in the order of params.yaml.

`data/results/<candidate>/<suite>` holds one evaluation (see `stages.core.tables`) and the record of its
candidate, that of a base also its questions. DVC evaluates before it reports, so results are missing only
where the stage is run by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from stages.core.errors import Refusal
from stages.core.files import RECORD, RESULTS, read_json
from stages.core.lazy import np, pd
from stages.core.schema import CONTROLS
from stages.core.tables import (
    ITEM,
    ITEM_COLUMNS,
    ITEMS,
    MEASURE,
    PARAMETERS_REMOVED,
    SAMPLES,
    SCORES,
    TOKENS,
    table,
)
from stages.reporting.divergence import divergences

KEY = [*MEASURE, "difficulty"]
"""The columns that make two scores the same measure at the same difficulty."""

Measure: TypeAlias = tuple[Any, ...]
"""The values of the columns `MEASURE`, None where missing: missing values must be equal, and NaN never is."""


@dataclass(frozen=True)
class Results:
    """All rows of a comparison: `scores`, a row a score, and `samples`, a row an item; both tidy."""

    scores: pd.DataFrame
    samples: pd.DataFrame
    items: pd.DataFrame = field(default_factory=lambda: table([], ITEM_COLUMNS))
    """The questions that the bases were asked, a row an item; joined with samples by `ITEM`."""
    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, kw_only=True)
    """The `artifact.json` of each candidate."""

    @property
    def candidates(self) -> list[str]:
        """Candidates in the order of params.yaml."""
        return list(dict.fromkeys(self.scores["candidate"]))

    @property
    def suites(self) -> list[str]:
        """Suites in the order of params.yaml."""
        return list(dict.fromkeys(self.scores["suite"]))


def collect(
    evaluations: Sequence[str], candidates: Sequence[str], suites: Sequence[str], root: Path = RESULTS
) -> Results:
    """Read the tables of exactly `evaluations`, each `<candidate>/<suite>`.

    Args:
        candidates: the order of candidates.
        suites: the order of suites within a candidate.

    Raises:
        Refusal: there are no evaluations, or some have no results; the message lists every missing one.
        ValueError: a candidate has two scores of one measure, a bug in its evaluation.
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
            f"run `dvc repro` to make them:\n{listed}"
        )
    order = {name: place for place, name in enumerate(f"{c}/{s}" for c in candidates for s in suites)}
    ordered = sorted(evaluations, key=order.__getitem__)
    scores, samples = (
        pd.concat([pd.read_parquet(root / name / file) for name in ordered], ignore_index=True)
        for file in (SCORES, SAMPLES)
    )
    if (twice := scores[scores.duplicated(["candidate", *KEY])]).size:
        raise ValueError(f"two scores of one measure: {twice[['candidate', *KEY]].to_dict('records')}")
    files = [root / name / TOKENS for name in ordered if (root / name / TOKENS).exists()]
    if files:
        tokens = pd.concat(map(pd.read_parquet, files), ignore_index=True)
        more = divergences(scores, samples, tokens)
        scores, samples = (
            pd.concat(pair, ignore_index=True) for pair in zip((scores, samples), more, strict=True)
        )
    scores = scores.assign(**{PARAMETERS_REMOVED: parameters_removed(scores)})
    folders = [root / name for name in ordered]
    return Results(scores, samples, read_items(folders), records=_read_records(folders))


def _read_records(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return the record in results, by candidate."""
    files = [folder / RECORD for folder in folders]
    found = [read_json(file) for file in files if file.exists()]
    return {record["artifact"]: record for record in found}


def read_items(folders: Sequence[Path]) -> pd.DataFrame:
    """Read the questions behind results, each once; only the results of a base hold them.

    Args:
        folders: results, `<candidate>/<suite>` each.
    """
    tables = [pd.read_parquet(folder / ITEMS) for folder in folders if (folder / ITEMS).exists()]
    items = pd.concat(tables, ignore_index=True) if tables else table([], ITEM_COLUMNS)
    return items.drop_duplicates(list(ITEM), ignore_index=True)


def parameters_removed(scores: pd.DataFrame) -> pd.Series[float]:
    """Return the share of its base's parameters that each row's candidate lacks.

    It is missing where the base is not among the candidates, and for a responder without a model.
    """
    counts = scores.drop_duplicates("candidate").set_index("candidate")["num_parameters"]
    whole = ("base/" + scores["base"]).map(counts).astype("float64")
    ours = scores["num_parameters"].astype("float64")
    return (1 - ours / whole).where(ours > 0)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a frame as dicts, None for a missing value and a list for an array."""
    return [{str(name): _plain(value) for name, value in row.items()} for row in frame.to_dict("records")]


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return None if value is pd.NA or value != value else value


def measure_of(row: Mapping[str, Any]) -> Measure:
    """Return the measure of a row from `records`."""
    return tuple(row[column] for column in MEASURE)


def by_measure(rows: pd.DataFrame) -> dict[Measure, pd.DataFrame]:
    """Group rows by measure, in the order in which measures appear."""
    return {
        tuple(map(_plain, key)): group for key, group in rows.groupby(list(MEASURE), dropna=False, sort=False)
    }


def is_noise(rows: pd.DataFrame) -> pd.Series[bool]:
    """Mark rows of noise candidates: the weights of another candidate, computed differently."""
    return rows["candidate"].str.startswith("noise/")


def competes(rows: pd.DataFrame) -> pd.Series[bool]:
    """Mark rows of models that compete, which noise candidates and responders without knowledge do not."""
    return ~rows["candidate"].str.startswith(CONTROLS)


def noise_by_measure(*tables: pd.DataFrame) -> pd.DataFrame:
    """Measure how far each score of a base moves when only its arithmetic changes.

    Args:
        tables: score rows, of one revision each.

    Returns:
        Columns `base`, those of `KEY`, and `noise`: the largest |difference| between a noise candidate and
        its source, over all tables.
    """
    moves = []
    for scores in tables:
        noisy = scores[is_noise(scores)]
        pairs = noisy.assign(candidate=noisy["source"]).merge(
            scores, on=["candidate", "base", *KEY], suffixes=("", "_source")
        )
        moves.append(pairs.assign(noise=(pairs["value"] - pairs["value_source"]).abs()))
    return pd.concat(moves).groupby(["base", *KEY], dropna=False)["noise"].max().reset_index()
