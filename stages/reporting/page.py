"""The page: everything a reader needs to judge the comparison, in one file that fetches nothing."""

import math
import re
import sys
from collections.abc import Mapping
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from stages.core.identity import beside
from stages.reporting import words
from stages.reporting.collect import KEY, Results, competes, records
from stages.reporting.comparison import Comparison
from stages.reporting.export import of_measure
from stages.reporting.scope import Scope

FLIPS_SHOWN = 8
"""Changed answers written out a candidate; samples.parquet has all."""
ANSWER_SHOWN = 80
"""Characters of an answer that are written out."""


def render(
    scope: Scope,
    results: Results,
    comparison: Comparison,
    alike: pd.DataFrame,
    pictures: Mapping[str, str],
) -> str:
    """The page's HTML; every number on it is from the rows, every word of a model is escaped.

    Args:
        alike: what `stages.reporting.agreement` found.
        pictures: SVG of the figures there are, by name.
    """
    environment = Environment(
        loader=FileSystemLoader(beside(__file__, "page.html").parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        name: getattr(words, name)
        for name in ("number", "score", "signed", "chance", "size", "short", "share")
    }
    rows = comparison.rows
    competing = comparison.competitors
    one_a_candidate = records(competing.drop_duplicates("candidate"))
    suites = list(dict.fromkeys(competing["suite"]))
    return environment.get_template("page.html").render(
        bases=[_base(scope, found) for _, found in rows.groupby("base", sort=False)],
        candidates=[_candidate(scope, row, suites) for row in one_a_candidate],
        suites=[_suite(rows[rows["suite"] == suite]) for suite in suites],
        headlines=[_measure(scope, competing, *measure) for measure in comparison.headlines()],
        measures=[_measure(scope, competing, *measure) for measure in _measures(competing)],
        noise=records(comparison.noise[comparison.noise["difficulty"] == "all"]),
        floors=records(rows[rows["candidate"].str.startswith("floor/") & (rows["difficulty"] == "all")]),
        difficulty=[_difficulty(scope, found) for _, found in _graded(competing)],
        agreement=records(alike),
        flips=_flips(results, comparison),
        compared=[
            int(competing[part]["family"].max())
            for part in (competing["difficulty"] == "all", competing["difficulty"] != "all")
            if part.any()
        ],
        undrawn=records(comparison.perplexities[1]),
        figures={stem: _inline(picture) for stem, picture in pictures.items()},
        facts={name: _distinct(rows, name) for name in ("dtype", "device", "threads", "seed")},
        shown=(FLIPS_SHOWN, ANSWER_SHOWN),
    )


def _distinct(rows: pd.DataFrame, name: str) -> str:
    return ", ".join(str(value) for value in rows[name].dropna().unique())


def _base(scope: Scope, rows: pd.DataFrame) -> dict[str, Any]:
    name = str(rows["base"].iloc[0])
    return {
        "name": name,
        "source": words.source(str(rows["base_source"].iloc[0])),
        "file": getattr(scope.models[name], "file", None),
        "sha256": scope.models[name].sha256,
        "grid": rows["base_grid"].iloc[0],
        "parameters": int(rows["num_parameters"].iloc[0]),
        "evaluated": f"base/{name}" in set(rows["candidate"]),
    }


def _candidate(scope: Scope, row: Mapping[str, Any], suites: list[str]) -> dict[str, Any]:
    recipes = scope.recipes
    lineage = row["lineage"].split(" > ")
    return {
        **row,
        "family": words.family(row),
        "steps": [
            (step, _flow(recipes[step].model_dump(mode="json"))) for step in lineage if step in recipes
        ],
        "path": lineage,
        "on_grid": _marks(row, scope)["on_grid"],
        "read": [name for name in scope.learned_from.get(row["candidate"], ()) if name in suites],
    }


def _flow(value: Any) -> str:
    """A recipe as it may stand in params.yaml: YAML in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _suite(rows: pd.DataFrame) -> dict[str, Any]:
    whole = rows[rows["difficulty"] == "all"]
    return {
        "name": rows["suite"].iloc[0],
        "source": words.source(str(rows["dataset_source"].iloc[0])),
        "items": _distinct(whole, "num_items"),
        "prompts": _distinct(whole[["prompt_hash"]].dropna().map(lambda value: value[:12]), "prompt_hash"),
        **{
            name: _distinct(whole, name)
            for name in ("task_version", "template", "shots", "readout", "metric")
        },
        "batch_size": _distinct(whole[competes(whole)], "batch_size"),
    }


def _measures(rows: pd.DataFrame) -> list[tuple[str, str, str]]:
    whole = rows[rows["difficulty"] == "all"]
    return list(dict.fromkeys(zip(whole["suite"], whole["readout"], whole["metric"], strict=True)))


def _measure(scope: Scope, rows: pd.DataFrame, suite: str, readout: str, metric: str) -> dict[str, Any]:
    chosen = [row | _marks(row, scope) for row in records(of_measure(rows, suite, readout, metric))]
    for row in chosen:
        nats = metric == "perplexity" and row["low"] is not None
        row["ratio"] = (_exp(row["low"]), _exp(row["high"])) if nats else None
    return {
        "suite": suite,
        "readout": readout,
        "metric": metric,
        "higher": bool(chosen[0]["higher_is_better"]),
        "floor": chosen[0]["floor"],
        "rows": chosen,
        "by_candidate": {row["candidate"]: row for row in chosen},
    }


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < math.log(sys.float_info.max) else math.inf


def _marks(row: Mapping[str, Any], scope: Scope) -> dict[str, bool]:
    """Whether a score is flattered by the grid of the base, and whether by its own domain."""
    return {
        "in_domain": row["suite"] in scope.learned_from.get(row["candidate"], ()),
        "on_grid": row["base_grid"] != "none" and row["quantize_method"] is not None,
    }


def _graded(rows: pd.DataFrame) -> list[tuple[Any, pd.DataFrame]]:
    leveled = rows.groupby(KEY[:-1], sort=False)
    return [(key, found) for key, found in leveled if found["difficulty"].nunique() > 1]


def _difficulty(scope: Scope, rows: pd.DataFrame) -> dict[str, Any]:
    levels = [level for level in dict.fromkeys(rows["difficulty"]) if level != "all"]
    cells: dict[str, dict[str, Any]] = {}
    found = records(rows)
    for row in found:
        cells.setdefault(row["candidate"], {})[row["difficulty"]] = row
    first = rows.iloc[0]
    return {
        "suite": first["suite"], "readout": first["readout"], "metric": first["metric"],
        "floor": None if pd.isna(first["floor"]) else float(first["floor"]),
        "levels": [*levels, "all"], "cells": cells,
        "about": {row["candidate"]: _marks(row, scope) for row in found},
    }  # fmt: skip


def _flips(results: Results, comparison: Comparison) -> list[dict[str, Any]]:
    """Generated answers whose score differs from the dense base's, the first few of each candidate."""
    references = comparison.competitors.dropna(subset=["reference"])
    pairs = references.drop_duplicates("candidate")[["candidate", "reference"]].to_numpy().tolist()
    samples = results.samples
    generated = samples[(samples["readout"] == "generation") & samples["response"].notna()]
    keys = ["suite", "task", "metric", "doc_id", "draw", "prompt_hash"]
    found = []
    for candidate, reference in pairs:
        ours, base = (generated[generated["candidate"] == name] for name in (candidate, reference))
        both = ours.merge(base, on=keys, suffixes=("", "_base"))
        changed = both[both["score"] != both["score_base"]]
        if len(changed):
            shown = records(changed.head(FLIPS_SHOWN))
            found.append({"candidate": candidate, "count": len(changed), "rows": shown})
    return found


def _inline(picture: str) -> Markup:
    """An SVG file as an element of the page: no prologue, and no ids but those it refers to itself."""
    text = picture[picture.index("<svg") :]
    referred = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([\w-]+)"', lambda found: found[0] if found[1] in referred else "", text)
    return Markup(text)
