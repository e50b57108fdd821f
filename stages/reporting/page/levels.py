"""How a loss depends on difficulty and on dose: the page's heat map and its curves.

A level has few items. A cell says so where its interval holds both no loss and a loss of ten points: then
the items do not tell. A score that is not clearly above its floor is marked as well.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from stages.core.tables import MEASURE
from stages.reporting.collect import Measure, by_measure, records
from stages.reporting.comparison import Comparison
from stages.reporting.scope import Scope
from stages.reporting.statistics.paired import Z

TEN_POINTS = 0.1
"""A loss that the items of a cell must show or exclude; if they do neither, they are too few."""
_SHADES = 6
_DOSES = ("sparsity", "bits")
"""Settings of recipes whose values make a sweep."""


def heat_maps(
    comparison: Comparison, headlines: Sequence[Measure], label: Mapping[Measure, str]
) -> list[dict[str, Any]]:
    """Return a heat map for each share of items right that has levels.

    Args:
        headlines: the measures to show, in the order of the table's columns.
    """
    maps = []
    for measure, scores in by_measure(comparison.competitors).items():
        rows = records(scores)
        if measure not in headlines or scores["difficulty"].nunique() < 2 or not rows[0]["higher_is_better"]:
            continue
        cells: dict[str, dict[str, Any]] = {}
        for row in rows:
            cells.setdefault(row["candidate"], {})[row["difficulty"]] = row | _marked(row)
        levels = [level for level in dict.fromkeys(scores["difficulty"]) if level != "all"]
        counts = {row["difficulty"]: row["num_items"] for row in rows}
        maps.append(
            {
                **dict(zip(MEASURE, measure, strict=True)),
                "place": headlines.index(measure),
                "label": label[measure],
                "levels": [*levels, "all"],
                "counts": counts,
                "floors": {row["difficulty"]: row["floor"] for row in rows if row["floor"] is not None},
                "cells": cells,
            }
        )
    return maps


def _marked(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shade of a cell (-1 for a gain, 0 for none, up to the darkest), and what limits it."""
    loss = None if row["delta"] is None else -row["delta"]
    few = row["low"] is not None and row["low"] <= -TEN_POINTS and row["high"] >= 0
    at_floor = row["floor"] is not None and row["value"] is not None
    return {
        "shade": None if loss is None else -1 if loss < 0 else min(_SHADES, round(loss * 12)),
        "few": few,
        "at_floor": at_floor and row["value"] - Z * (row["stderr"] or 0.0) <= row["floor"],
    }


def sweeps(scope: Scope, comparison: Comparison) -> list[dict[str, Any]]:
    """Return the recipes that differ in a dose alone, a dict a series of two or more.

    Returns:
        `name`, `dose` (`bits` or `sparsity`), and `points`, a list of (dose, candidate), in order of dose.
    """
    series: dict[str, dict[str, Any]] = {}
    for candidate in dict.fromkeys(comparison.competitors["candidate"]):
        recipe = scope.recipes.get(candidate)
        settings = recipe.model_dump(mode="json") if recipe is not None else {}
        for dose in _DOSES:
            if isinstance(settings.get(dose), int | float):
                others = {key: value for key, value in settings.items() if key != dose}
                key = json.dumps([dose, others], sort_keys=True)
                name = f"{settings['method']} on {settings['source']}"
                entry = series.setdefault(key, {"name": name, "dose": dose, "points": []})
                entry["points"].append((settings[dose], candidate))
    several = [
        entry | {"points": sorted(entry["points"])} for entry in series.values() if len(entry["points"]) > 1
    ]
    names = [entry["name"] for entry in several]
    for place, entry in enumerate(several):  # series that only other settings tell apart
        if names.count(entry["name"]) > 1:
            entry["name"] += f" ({place + 1}: {entry['points'][0][1].split('/')[1]}, …)"
    return several
