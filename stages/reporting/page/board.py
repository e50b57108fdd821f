"""The page's one table: a line a candidate with sizes, speed, memory, and headline scores beside the base's.

A score stands as a share of the base's: 0.98 of its answers, or 1.04 times its perplexity. The interval is
that of the difference paired over the items, divided by the base's score as it was measured.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from stages.core.tables import MEASURE
from stages.profiling.speed import NOTED
from stages.reporting import words
from stages.reporting.collect import Measure, by_measure, records
from stages.reporting.comparison import Comparison
from stages.reporting.margins import margin_of
from stages.reporting.measured import Measured

_WIDTH, _HEIGHT = 110.0, 14.0
_LARGEST = 8.0
"""A bar ends here at the latest, in times the base's perplexity."""


def board(
    comparison: Comparison, label: Mapping[Measure, str], margin: float, measured: Measured | None
) -> dict[str, Any]:
    """Return the table's `columns`, a dict a headline measure, and `lines`, a dict a candidate."""
    rows = comparison.competitors
    whole = by_measure(rows[rows["difficulty"] == "all"])
    headlines = [measure for measure in comparison.headlines() if measure in whole]
    yardsticks = set(rows["reference"].dropna()) | {f"base/{name}" for name in rows["base"]}
    columns, cells = [], []
    for place, measure in enumerate(headlines):
        named = dict(zip(MEASURE, measure, strict=True))
        scores = records(whole[measure])
        column = {
            "key": f"m{place}",
            **named,
            "label": label[measure],
            "ratio": named["metric"] == "perplexity",
            "higher": bool(scores[0]["higher_is_better"]),
        }
        by_candidate = {row["candidate"]: _cell(row, yardsticks) for row in scores}
        _draw(list(by_candidate.values()), column["ratio"], margin_of(named["metric"], margin))
        columns.append(column)
        cells.append(by_candidate)
    speeds = _speeds(measured)
    lines = [
        {
            "candidate": row["candidate"],
            "sizes": {kind: _size(row, kind, comparison) for kind in ("bytes_on_disk", "bytes_ideal")},
            "speed": speeds.get(row["candidate"]),
            "cells": [column.get(row["candidate"]) for column in cells],
        }
        for row in records(rows.drop_duplicates("candidate"))
    ]
    return {"columns": columns, "lines": lines, "measured": any(line["speed"] for line in lines)}


def _size(row: Mapping[str, Any], kind: str, comparison: Comparison) -> dict[str, Any]:
    """Return a candidate's bytes and their share of its reference's, or of its base's."""
    of = f"base/{row['base']}" if row["reference"] is None else row["reference"]
    reference = comparison.rows[comparison.rows["candidate"] == of]
    share = float(row[kind]) / float(reference[kind].iloc[0]) if len(reference) else None
    return {"bytes": row[kind], "share": share}


def _cell(row: dict[str, Any], yardsticks: set[str]) -> dict[str, Any]:
    """Add to a score row its share of the reference's and the ends of its interval; None where undefined.

    `whole` is the candidate whose score is the whole of this one: the reference, or itself where others are
    compared with it; None where there is neither.
    """
    value, low, high = _shares(row)
    own = row["reference"] is None and row["candidate"] in yardsticks and _finite(row["value"])
    whole = row["candidate"] if own else row["reference"]
    return row | {"share": value, "share_low": low, "share_high": high, "whole": whole, "bar": None}


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _shares(row: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    reference = row["reference_value"]
    if reference is None or not math.isfinite(reference) or not math.isfinite(row["value"]) or reference <= 0:
        return None, None, None
    value = row["value"] / reference
    if row["low"] is None:
        return value, None, None
    if row["metric"] == "perplexity":
        low, high = (math.exp(min(row[end], 700.0)) for end in ("low", "high"))
    else:
        low, high = (max(0.0, (reference + row[end]) / reference) for end in ("low", "high"))
    return value, low, high


def _draw(cells: Sequence[dict[str, Any]], ratio: bool, margin: float) -> None:
    """Draw the interval bars of a column, on one scale: logarithmic for perplexities."""
    ends = [cell[name] for cell in cells for name in ("share", "share_high") if cell[name] is not None]
    low, high = (0.9, min(_LARGEST, max([1.5, *ends]))) if ratio else (0.0, min(2.0, max([1.2, *ends])))

    def place(value: float) -> float:
        value = min(max(value, low), high)
        share = math.log(value / low) / math.log(high / low) if ratio else (value - low) / (high - low)
        return 4 + share * (_WIDTH - 8)

    for cell in cells:
        if cell["share"] is not None:
            # A margin is in nats of a perplexity, else in points of a score.
            half = math.expm1(margin) if ratio else margin / cell["reference_value"]
            cell["bar"] = _bar(cell, place, (max(low, 1 - half), 1 + half), high)


def _bar(cell: Mapping[str, Any], place: Any, margin: tuple[float, float], high: float) -> Markup:
    width, height, middle = _WIDTH, _HEIGHT, _HEIGHT / 2
    left, right = (place(end) for end in margin)
    x = place(cell["share"])
    parts = [
        f'<svg class="bar" role="img" viewBox="0 0 {width:g} {height:g}" width="{width:g}">',
        f"<title>{spoken(cell)}</title>",
        f'<rect class="band" x="{left:.1f}" y="0" width="{right - left:.1f}" height="{height:g}"/>',
        f'<path class="one" d="M{place(1.0):.1f} 0V{height:g}"/>',
    ]
    if cell["share_low"] is not None:
        low, top = place(cell["share_low"]), place(cell["share_high"])
        parts.append(f'<path class="reach" d="M{low:.1f} {middle:g}H{top:.1f}"/>')
    if cell["share"] > high:  # an arrow that points beyond the bar
        tip = f"{x - 4:.1f} {middle - 4:g}L{x + 3:.1f} {middle:g}L{x - 4:.1f} {middle + 4:g}Z"
        parts.append(f'<path class="dot" d="M{tip}"/>')
    else:
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{middle:g}" r="3"/>')
    return Markup("".join(parts) + "</svg>")


def spoken(cell: Mapping[str, Any]) -> str:
    """Say a share with its interval, such as `96 % to 102 % of the reference (95 %)`."""
    if cell["share_low"] is None:
        return f"{relative(cell['share'], cell['metric'])} of the reference"
    low, high = (relative(cell[name], cell["metric"]) for name in ("share_low", "share_high"))
    return f"{low} to {high} of the reference (95 %)"


def relative(share: float | None, metric: str) -> str:
    """Format a share of the base's score: in per cent, a perplexity as times."""
    if share is None:
        return "–"
    if metric != "perplexity":
        return f"{100 * share:.1f} %" if 0.9 < share < 1.1 else words.share(share)
    if share >= 1e6:
        return f"×{words.compact(share)}"
    return f"×{share:,.3f}" if share < 1.1 else f"×{share:,.2f}" if share < 100 else f"×{share:,.0f}"


def _speeds(measured: Measured | None) -> dict[str, dict[str, Any]]:
    """Return what was measured of each candidate, at its smallest batch size."""
    if measured is None or measured.figures.empty:
        return {}
    rows = records(measured.figures.sort_values("batch_size", kind="stable").drop_duplicates("candidate"))
    return {row["candidate"]: row | {"busy": row["others_busy"] > NOTED} for row in rows}
