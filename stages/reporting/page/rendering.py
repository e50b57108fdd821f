"""Render the page that says what to ship, and shows why: a single file that fetches nothing.

All of it stands in the page as HTML first, so that it can be read, searched and printed without scripts.
Scripts add the controls of the answer, sorting and filtering, the charts, and the items.
"""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stages.core.identity import beside
from stages.core.tables import MEASURE
from stages.reporting import words
from stages.reporting.collect import Measure, Results, by_measure, competes, measure_of, records
from stages.reporting.comparison import Comparison
from stages.reporting.hypotheses.evidence import Verdict
from stages.reporting.measured import Measured
from stages.reporting.page import packing
from stages.reporting.page.answer import BUDGETED, Recommendations, share_of
from stages.reporting.page.board import board, relative
from stages.reporting.page.browse import browse, references_of
from stages.reporting.page.by_block import block_rows, by_artifact, not_finite, recovery_curves
from stages.reporting.page.levels import heat_maps, sweeps
from stages.reporting.page.points import chart_data
from stages.reporting.page.processors import processors
from stages.reporting.scope import Scope
from stages.reporting.wrong import CLASSES

_CHOICES = (
    "structure", "allocation", "scope", "importance", "block_metric", "blocks_removed", "width_ratio", "arm",
    "steps", "train_difficulty", "recipe_seed",
)  # fmt: skip
"""Columns shown beside a candidate's recipes where they have a value."""
_DIVERGENCES = ("kl", "same_top")
"""Metrics whose levels are the base's confidence, not difficulty."""
_LIBRARIES = ("vega.min.js", "vega-lite.min.js", "vega-embed.min.js", "tabulator.min.js")
_SCRIPTS = ("page.js", "answer.js", "board.js", "charts.js", "items.js")


def render(
    scope: Scope,
    results: Results,
    comparison: Comparison,
    agreements: pd.DataFrame,
    verdicts: Sequence[Verdict] = (),
    measured: Measured | None = None,
    wrong: pd.DataFrame | None = None,
    effects: Mapping[str, str] | None = None,
) -> str:
    """Return the page's HTML; every number comes from the rows, and text written by models is escaped.

    Args:
        agreements: the table of `stages.reporting.agreement`.
        verdicts: those of all studies.
        measured: speed and memory; None where nothing was measured.
        wrong: the classes of wrong answers.
        effects: the picture of a study's verdicts, as SVG, by study.
    """
    environment = Environment(
        loader=FileSystemLoader(beside(__file__, "templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"relative": relative} | {
        name: getattr(words, name)
        for name in (
            "number",
            "score",
            "signed",
            "p_value",
            "size",
            "short",
            "share",
            "compact",
            "fewest",
            "removal",
        )
    }
    vendor, assets = beside(__file__, "vendor"), beside(__file__, "assets")
    rows, competing, noise = comparison.rows, comparison.competitors, comparison.noise
    label = words.labels(rows)
    suites = list(dict.fromkeys(competing["suite"]))
    measures = {
        measure: _measure(scope, label[measure], scores)
        for measure, scores in by_measure(competing[competing["difficulty"] == "all"]).items()
    }
    candidates = [_candidate(scope, row, suites) for row in records(competing.drop_duplicates("candidate"))]
    names = [row["candidate"] for row in candidates]
    anchors = {name: f"c{place}" for place, name in enumerate(names)}
    table = board(comparison, label, scope.report.margin, measured)
    answers = Recommendations(comparison, label, scope.report.margin, scope.report.noise)
    series, references = sweeps(scope, comparison), references_of(competing)
    headlines = [measure for measure in comparison.headlines() if measure in measures]
    items, left_out = browse(results, headlines, names, references)
    heat = heat_maps(comparison, headlines, label)
    made_on = processors(results.records, names)
    by_block, curves = block_rows(results.records, names), recovery_curves(results.records)
    data = {
        "anchors": anchors,
        "references": references,
        "answer": answers.controls() | {"budgets": answers.budgets},
        "charts": chart_data(table, {row["candidate"]: row["family"] for row in candidates}, series, scope)
        | {"blocks": by_block, "recovery": curves},
    }
    return environment.get_template("page.html").render(
        bases=[_base(scope, group) for _, group in rows.groupby("base", sort=False)],
        candidates=candidates,
        anchors=anchors,
        made_on=made_on,
        processors={
            name: [candidate for candidate, known in made_on.items() if name in known]
            for name in dict.fromkeys(name for known in made_on.values() for name in known)
        },
        own_domain={name: [row["candidate"] for row in candidates if name in row["read"]] for name in suites},
        board=table,
        measured=table["measured"],
        answers=[
            {"reference": name, "lines": answers.of(name, scope.report.margin)} for name in answers.references
        ],
        margins=[(value, share_of(value)) for value in answers.margins],
        kinds=list(BUDGETED.items()),
        heat=heat,
        sweeps=series,
        blocks={kind: by_artifact(by_block, kind) for kind in ("error", "sparsity")} if by_block else {},
        not_finite=not_finite(results.records, names),
        recovery=curves,
        by_level=_by_level(scope, competing, label, {_of(entry) for entry in heat}),
        left_out=left_out,
        suites=[_suite(rows[rows["suite"] == suite], label) for suite in suites],
        measures=list(measures.values()),
        noise=_labelled(noise[noise["difficulty"] == "all"], label),
        floors=_labelled(
            rows[rows["candidate"].str.startswith("floor/") & (rows["difficulty"] == "all")], label
        ),
        agreement=records(agreements),
        wrong=[] if wrong is None else records(wrong),
        classes=CLASSES,
        profile=records(measured.figures) if measured else [],
        compared=int(competing["family"].max()) if len(competing) else 0,
        studies=[
            {
                "name": name,
                "study": study,
                "picture": packing.picture(effects[name]) if effects and name in effects else None,
                "verdicts": [verdict for verdict in verdicts if verdict.study == name],
            }
            for name, study in scope.studies.items()
        ],
        pooled=records(comparison.pooled),
        margin=scope.report.margin,
        repeats=bool(scope.report.noise),
        reference=scope.report.reference,
        undrawn=records(comparison.perplexities[1]),
        facts={
            "file_dtype": _listed(competing["dtype"]),
            **{name: _listed(rows[name]) for name in ("dtype", "device", "threads", "seed")},
        },
        style=packing.inline_style(
            packing.texts_of(vendor, "tabulator_simple.min.css") + packing.texts_of(assets, "page.css")
        ),
        data=packing.embedded(data),
        libraries=packing.zipped(packing.texts_of(vendor, *_LIBRARIES)),
        packed_items=items,
        script=packing.inline_script(packing.texts_of(assets, *_SCRIPTS)),
        licences=packing.texts_of(vendor, "LICENSE"),
    )


def _of(entry: Mapping[str, Any]) -> Measure:
    return tuple(entry[name] for name in MEASURE)


def _by_level(
    scope: Scope, competing: pd.DataFrame, label: Mapping[Measure, str], drawn: set[Measure]
) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Return the scores by level that no heat map shows: a title, a sentence, and their tables."""
    parts: tuple[tuple[str, str, list[dict[str, Any]]], ...] = (
        ("Other scores by level", "Single levels have differences but no word.", []),
        (
            "Distance from the base's predictions, by its confidence",
            "Sure: the base gives its likeliest token more than .9; likely: more than .5; unsure: less.",
            [],
        ),
    )
    for measure, scores in by_measure(competing).items():
        if scores["difficulty"].nunique() > 1 and measure not in drawn:
            diverging = measure[MEASURE.index("metric")] in _DIVERGENCES
            parts[diverging][2].append(_difficulty(scope, label[measure], scores))
    return [part for part in parts if part[2]]


def _listed(values: "pd.Series[Any]") -> str:
    return ", ".join(str(value) for value in values.dropna().unique())


def _labelled(rows: pd.DataFrame, label: Mapping[Measure, str]) -> list[dict[str, Any]]:
    return [row | {"label": label[measure_of(row)]} for row in records(rows)]


def _base(scope: Scope, rows: pd.DataFrame) -> dict[str, Any]:
    first = records(rows.head(1))[0]
    model = scope.models[first["base"]]
    return {
        "name": first["base"],
        "source": words.source(first["base_source"]),
        "file": getattr(model, "file", None),
        "sha256": model.sha256,
        "grid": first["base_grid"],
        "parameters": first["num_parameters"],
        "evaluated": f"base/{first['base']}" in set(rows["candidate"]),
    }


def _candidate(scope: Scope, row: Mapping[str, Any], suites: Iterable[str]) -> dict[str, Any]:
    recipes = scope.recipes
    return {
        **row,
        "family": words.family(row),
        "steps": [
            (step, _flow(recipes[step].model_dump(mode="json"))) for step in row["lineage"] if step in recipes
        ],
        "choices": [
            (name.replace("_", " "), words.number(value) if isinstance(value, float) else value)
            for name in _CHOICES
            if (value := row[name]) or (name == "recipe_seed" and value is not None)
        ],
        "on_grid": _marks(row, scope)["on_grid"],
        "read": [name for name in suites if scope.has_read(row["candidate"], name)],
        "published": getattr(scope.models.get(row["base"]), "format", None) == "packed",
    }


def _flow(value: Any) -> str:
    """Format a recipe as a line of YAML, as it may stand in params.yaml."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _suite(rows: pd.DataFrame, label: Mapping[Measure, str]) -> dict[str, Any]:
    whole = rows[rows["difficulty"] == "all"]
    return {
        "name": rows["suite"].iloc[0],
        "source": words.source(str(rows["dataset_source"].iloc[0])),
        "items": _listed(whole["num_items"]),
        "prompts": _listed(whole["prompt_hash"].str[:12]),
        **{
            name: _listed(whole[name])
            for name in ("task_version", "template", "penalties", "shots", "readout")
        },
        "metrics": "; ".join(label[measure] for measure in by_measure(whole)),
        "batch_size": _listed(whole[competes(whole)]["batch_size"]),
        "cut": int(whole["cut_prompts"].fillna(0).max()),
    }


def _measure(scope: Scope, label: str, rows: pd.DataFrame) -> dict[str, Any]:
    chosen = [row | _marks(row, scope) for row in records(rows)]
    for row in chosen:
        nats = row["metric"] == "perplexity" and row["low"] is not None
        row["ratio"] = (_exp(row["low"]), _exp(row["high"])) if nats else None
    first = chosen[0]
    return {
        **{name: first[name] for name in (*MEASURE, "floor")},
        "label": label,
        "higher": bool(first["higher_is_better"]),
        "rows": chosen,
        "by_candidate": {row["candidate"]: row for row in chosen},
    }


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < math.log(sys.float_info.max) else math.inf


def _marks(row: Mapping[str, Any], scope: Scope) -> dict[str, bool]:
    """Return whether the base's grid flatters a score, and whether text of the suite's own domain does."""
    return {
        "in_domain": scope.has_read(row["candidate"], row["suite"]),
        "on_grid": row["base_grid"] is not None and row["quantize_method"] is not None,
    }


def _difficulty(scope: Scope, label: str, rows: pd.DataFrame) -> dict[str, Any]:
    levels = [level for level in dict.fromkeys(rows["difficulty"]) if level != "all"]
    scores = records(rows)
    cells: dict[str, dict[str, Any]] = {}
    for row in scores:
        cells.setdefault(row["candidate"], {})[row["difficulty"]] = row
    return {
        **{name: scores[0][name] for name in (*MEASURE, "floor")},
        "label": label,
        "levels": [*levels, "all"],
        "cells": cells,
        "about": {row["candidate"]: _marks(row, scope) for row in scores},
    }
