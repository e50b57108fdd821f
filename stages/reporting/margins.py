"""Put a difference into a word, given how large a loss does not matter.

- `same within the margin`: the difference is surely smaller than the margin (two one-sided tests).
- `slightly worse`, `worse`: surely a loss; by no more than the margin, or by more. Likewise `better`.
- `below noise`: no larger than what other arithmetic changes (the `noise` candidates), or, over the repeats
  that `report.noise` names, than their spread; and not shown to be the same.
- `not settled`: anything else. Beside it stands the smallest loss that these items show in four of five
  evaluations, so that a large difference of few items is not read as none.

p-values are corrected (Holm) over what is asked, the headline metrics of all competing candidates. Other
metrics and single levels have differences and intervals but no verdict; a study may ask about them.
"""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from stages.reporting.collect import records
from stages.reporting.statistics.holm import holm
from stages.reporting.statistics.paired import LEVEL
from stages.reporting.words import fewest

SAME, BELOW_NOISE, OPEN = "same within the margin", "below noise", "not settled"


def with_verdicts(rows: pd.DataFrame, asked: "pd.Series[bool]", margin: float) -> pd.DataFrame:
    """Add `p_corrected`, `family` and `verdict`, correct `p_same`; rows not marked in `asked` have none."""
    rows = rows.assign(p_corrected=math.nan, family=0)
    family = asked & rows["p"].notna()
    rows.loc[family, "p_corrected"] = holm(rows.loc[family, "p"].tolist())
    rows.loc[family, "p_same"] = holm(rows.loc[family, "p_same"].tolist())
    rows.loc[~family, "p_same"] = math.nan
    rows.loc[family, "family"] = int(family.sum())
    verdicts = [
        _verdict(row, margin) if is_asked else "" for row, is_asked in zip(records(rows), asked, strict=True)
    ]
    return rows.assign(verdict=verdicts)


def _verdict(row: dict[str, Any], margin: float) -> str:
    """Return the word for a row: `untested` without items, empty where there is no difference."""
    if row["delta"] is None:
        return ""
    noisy = row["noise"] is not None and abs(row["delta"]) <= row["noise"]
    if row.get("repeated_delta") is not None:  # two revisions have no repeats
        noisy |= abs(row["repeated_delta"]) <= row["repeated_noise"]
    if row["p_corrected"] is None:
        return BELOW_NOISE if noisy else "untested"
    sure = row["p_corrected"] <= LEVEL
    if row["p_same"] is not None and row["p_same"] <= LEVEL and (noisy or not sure):
        return SAME
    if noisy:
        return BELOW_NOISE
    if not sure:
        return OPEN
    word = "better" if (row["change"] > 0) == bool(row["higher_is_better"]) else "worse"
    return word if abs(row["change"]) > margin_of(row["metric"], margin) else f"slightly {word}"


def worded(row: Mapping[str, Any]) -> str:
    """Return the verdict of a row; where it is not settled, with the smallest change that the items show."""
    verdict = row["verdict"] or ""
    if verdict != OPEN or row["smallest"] is None:
        return verdict
    return f"{verdict} ({row['pairs']:.0f} items show {fewest(row)})"


def margin_of(metric: str, margin: float) -> float:
    """Return the margin in the unit of a metric's items: nats for a perplexity, of which it is a share."""
    return math.log1p(margin) if metric == "perplexity" else margin
