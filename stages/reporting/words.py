"""Put rows into words: labels of measures, families of methods, short names, and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from stages.core.lazy import pd
from stages.core.tables import MEASURE, PARAMETERS_REMOVED
from stages.reporting.collect import Measure, measure_of, records

FAMILIES = ("dense", "pruned", "quantized", "pruned and quantized", "recovered")
SHARES = ("acc", "exact_match", "prompt_level_strict_acc", "pass@1", "answers")
"""Metrics that are shares of items, read in points."""
NEGLIGIBLE = 0.0005
"""A share below this is shown as none."""
MINUS = "\N{MINUS SIGN}"


def labels(scores: pd.DataFrame) -> dict[Measure, str]:
    """Label every measure in `scores`, such as `pass@4, budget 512`, uniquely within its suite.

    A label has the metric, the budget, and whichever other columns tell measures of this metric in the
    suite apart.
    """
    namesakes: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in records(scores[list(MEASURE)].drop_duplicates()):
        namesakes.setdefault((row["suite"], row["metric"]), []).append(row)
    return {
        measure_of(row): _label(row, [name for name in MEASURE if len({other[name] for other in rows}) > 1])
        for rows in namesakes.values()
        for row in rows
    }


def _label(row: Mapping[str, Any], differing: list[str]) -> str:
    named = {name: row[name] for name in differing if row[name] is not None}
    parts = [f"{row['metric']} of {named['counted']}" if "counted" in named else row["metric"]]
    parts += [named[name] for name in ("filter", "readout", "task") if name in named]
    if row["budget"] is not None:
        parts.append(f"budget {row['budget']}")
    return ", ".join(parts)


def family(row: Mapping[str, Any]) -> str:
    """Return what was done to a score row's model, one of `FAMILIES`; a fine-tuned model is `recovered`."""
    pruned, quantized, tuned = (
        not pd.isna(row[f"{stage}_method"]) for stage in ("prune", "quantize", "finetune")
    )
    return FAMILIES[4 if tuned else pruned + 2 * quantized]


def short(candidate: str) -> str:
    """Return a candidate's recipe without its stage."""
    return PurePath(candidate).name


def source(text: str) -> str:
    """Return a source as params.yaml has it, but only the last part of a local path."""
    path = text.removeprefix("path:")
    return text if path == text else f"path:{PurePath(path).name}"


def number(value: float | None, metric: str = "") -> str:
    """Format a score: three decimals, for perplexities two from 0.1 and none from 1000; a dash if missing."""
    if value is None or _is_missing(value):
        return "–"
    size = abs(value)
    digits = 3 if metric != "perplexity" or size < 0.1 else 2 if size < 1000 else 0
    text = f"{value:,.{digits}f}"
    return text.replace("-", MINUS) if float(text.replace(",", "")) else text.removeprefix("-")


def _is_missing(value: float) -> bool:
    return bool(math.isnan(value) if isinstance(value, float) else pd.isna(value))


def score(value: float | None, metric: str = "") -> str:
    """Format a measured score as `number` does, but a missing one, which came out as no number, as NaN."""
    return "NaN" if value is None else number(value, metric)


def signed(value: float, metric: str = "") -> str:
    """Format a difference as `number` does, with its sign."""
    text = number(value, metric)
    return text if text.startswith(MINUS) else f"+{text}"


def p_value(p: float) -> str:
    """Format a p-value."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def compact(value: float | None) -> str:
    """Format an effect of any unit to three digits, a dash if missing."""
    return "–" if value is None or _is_missing(value) else f"{value:.3g}".replace("-", MINUS)


def fewest(row: Mapping[str, Any]) -> str:
    """Return the smallest loss that a row's items show, in its unit: points, per cent of a perplexity."""
    smallest = row["smallest"]
    if smallest is None or _is_missing(smallest):
        return ""
    if row["metric"] == "perplexity":
        return f"{100 * math.expm1(min(smallest, 50.0)):.3g} %"
    return f"{100 * smallest:.3g} points" if row["metric"] in SHARES else f"{smallest:.3g}"


def share(value: float) -> str:
    """Format a share in percent."""
    return f"{round(100 * value):,} %".replace("-", MINUS)


def removal(row: Mapping[str, Any]) -> str:
    """Format the share of weights that are zero, a dash if unknown, that of parameters gone, or both."""
    parts, sparsity = row[PARAMETERS_REMOVED] or 0.0, row["sparsity"]
    zeros = "–" if sparsity is None else f"{100 * sparsity:.1f} %"
    if parts < NEGLIGIBLE:
        return zeros
    gone = f"{100 * parts:.1f} % of parameters"
    return gone if sparsity is None or sparsity < NEGLIGIBLE else f"{gone}, then {zeros}"


def size(count: float) -> str:
    """Format bytes in decimal units."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def answer_text(answer: str | None, readout: str, choices: Sequence[str] | None) -> str | None:
    """Return the text of an answer; a choice by likelihood is recorded by its number in `choices`."""
    listed = [] if choices is None else choices
    if readout == "likelihood" and answer and answer.isdecimal() and int(answer) < len(listed):
        return listed[int(answer)]
    return answer
