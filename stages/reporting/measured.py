"""Read what `profile` measured: speed, memory and energy of each candidate at each batch size.

Measurements vary from run to run, and scores do not. So they stand in files of their own: nothing here enters
the tables of scores, and a hypothesis that reads a measurement has its verdict beside those on scores.

A repeat is a run of the same process, one after another. Repeats show how steady a measurement was; they do
not show what another process, or another day, would have measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from stages.core.errors import Refusal
from stages.core.files import PROFILES, read_json
from stages.profiling.speed import NOTED

_FACTS = ("prompt_tokens", "new_tokens", "repeats", "threads", "device", "dtype", "torch", "processor")
"""The conditions of a measurement; times under different ones are not compared."""
_COLUMNS = (
    "candidate", "batch_size", "seconds_to_first_token", "seconds_to_first_token_low",
    "seconds_to_first_token_high", "seconds_per_token", "seconds_per_token_low", "seconds_per_token_high",
    "tokens_per_second", "peak_bytes", "joules_per_token", "energy", "others_busy", *_FACTS,
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """The measurements of a report."""

    figures: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(_COLUMNS)))
    """A row a candidate and batch size; times in seconds, the median with both quartiles."""
    repeats: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(
            columns=["candidate", "batch_size", "repeat", "seconds_to_first_token", "seconds_per_token"]
        )
    )
    """A row a run: `repeat`, `seconds_to_first_token` and `seconds_per_token`."""

    def fault(self, wanted: Sequence[tuple[str, int]]) -> str:
        """Say why the times of some (candidate, batch size) cannot be compared; empty if they can."""
        rows = self.figures.set_index(["candidate", "batch_size"]).loc[list(dict.fromkeys(wanted))]
        for row in rows.reset_index().to_dict("records"):
            if row["others_busy"] > NOTED:
                return (
                    f"other processes took {row['others_busy']:.0%} of the machine while {row['candidate']} "
                    f"was measured at batch size {row['batch_size']}; measure it again"
                )
        differing = [name for name in _FACTS if rows[name].nunique() > 1]
        return f"the measurements differ in {', '.join(differing)}" if differing else ""


def read_measured(candidates: Sequence[str], root: Path = PROFILES) -> Measured:
    """Read the measurements of `candidates`, in this order.

    Raises:
        Refusal: some are missing; the message names them all.
    """
    if missing := [name for name in candidates if not (root / name / "profile.json").exists()]:
        raise Refusal(
            f"{', '.join(missing)} in profile.candidates has no measurement in {root}; run `dvc repro` to "
            "measure it."
        )
    if not candidates:
        return Measured()
    rows = [row for name in candidates for row in _figures(read_json(root / name / "profile.json"))]
    repeats = [pd.read_parquet(root / name / "repeats.parquet") for name in candidates]
    return Measured(pd.DataFrame(rows, columns=list(_COLUMNS)), pd.concat(repeats, ignore_index=True))


def _figures(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row a batch size from a `profile.json`."""
    rows = []
    for batch in facts["batches"]:
        row = {name: facts[name] for name in ("candidate", *_FACTS)} | batch
        for name in ("seconds_to_first_token", "seconds_per_token"):
            quartiles = row.pop(name)
            row |= {
                name: quartiles["median"],
                f"{name}_low": quartiles["low"],
                f"{name}_high": quartiles["high"],
            }
        rows.append(row)
    return rows
