"""The data of the page's charts: scores, sizes, speed and memory, and who is on which Pareto front."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from stages.reporting.scope import Scope
from stages.reporting.statistics.pareto import frontier
from stages.reporting.words import FAMILIES, short

AXES = {
    "disk": "size on disk, MB",
    "ideal": "ideal size, MB",
    "latency": "milliseconds a token",
    "memory": "peak memory, MB",
}


def chart_data(
    table: dict[str, Any], families: dict[str, str], series: Sequence[dict[str, Any]], scope: Scope
) -> dict[str, Any]:
    """Return all that the charts draw.

    Args:
        table: what `stages.reporting.page.board` returns.
        families: the family of each candidate.
        series: what `stages.reporting.page.levels.sweeps` returns.

    Returns:
        `measures`; `axes`, those with values; `points`, a dict a candidate, its scores as (share of the
        base's, low, high, score, verdict); `fronts`, by axis and measure a list for each base, as shares of
        different bases do not compare, of the places of candidates; `sweeps`; `reference`, its name.
    """
    lines = table["lines"]
    points = [
        {
            "candidate": line["candidate"],
            "short": short(line["candidate"]),
            "family": families[line["candidate"]],
            "disk": line["sizes"]["bytes_on_disk"]["bytes"] / 1e6,
            "ideal": line["sizes"]["bytes_ideal"]["bytes"] / 1e6,
            "latency": line["speed"] and 1000 * line["speed"]["seconds_per_token"],
            "memory": line["speed"] and line["speed"]["peak_bytes"] and line["speed"]["peak_bytes"] / 1e6,
            "scores": [_point(cell) for cell in line["cells"]],
        }
        for line in lines
    ]
    axes = [axis for axis in AXES if any(point[axis] is not None for point in points)]
    fronts = {
        axis: [
            _fronts(points, axis, place, column["higher"], [line["cells"][place] for line in lines])
            for place, column in enumerate(table["columns"])
        ]
        for axis in axes
    }
    return {
        "measures": [
            {
                "name": f"{column['suite']}: {column['label']}",
                "ratio": column["ratio"],
                "higher": column["higher"],
            }
            for column in table["columns"]
        ],
        "axes": {axis: AXES[axis] for axis in axes},
        "families": [family for family in FAMILIES if family in families.values()],
        "points": points,
        "fronts": fronts,
        "sweeps": list(series),
        "reference": short(scope.report.reference) if scope.report.reference else "the base",
    }


def _point(cell: dict[str, Any] | None) -> list[Any] | None:
    """Return a score; what others are compared with is the whole of its own."""
    if cell is None or cell["value"] is None:
        return None
    if cell["whole"] == cell["candidate"]:
        return [1.0, None, None, cell["value"], ""]
    return [cell["share"], cell["share_low"], cell["share_high"], cell["value"], cell["verdict"]]


def _fronts(
    points: Sequence[dict[str, Any]],
    axis: str,
    place: int,
    higher: bool,
    cells: Sequence[dict[str, Any] | None],
) -> list[list[int]]:
    """Return the places of the points that nothing with the same base beats, a list a base."""

    def loss(point: dict[str, Any]) -> float:
        score = point["scores"][place]
        value = np.nan if score is None or score[0] is None else score[0]
        return -value if higher else value

    groups: dict[str, list[int]] = {}
    for at, cell in enumerate(cells):
        if cell is not None and cell["whole"] is not None:
            groups.setdefault(cell["whole"], []).append(at)
    fronts = []
    for group in groups.values():
        sizes = [np.nan if points[at][axis] is None else points[at][axis] for at in group]
        on = frontier(sizes, [loss(points[at]) for at in group])
        fronts.append([at for at, marked in zip(group, on, strict=True) if marked])
    return fronts
