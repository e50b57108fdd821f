"""How rows are said: families of methods, short names, and numbers with the digits that matter."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import pandas as pd

FAMILIES = ("dense", "pruned", "quantized", "pruned and quantized", "recovered")
MINUS = "\N{MINUS SIGN}"


def family(row: Mapping[str, Any]) -> str:
    """What was done to the model of a score row, one of FAMILIES; a fine-tuned one is `recovered`."""
    pruned, quantized, tuned = (
        not pd.isna(row[f"{stage}_method"]) for stage in ("prune", "quantize", "finetune")
    )
    return FAMILIES[4 if tuned else pruned + 2 * quantized]


def short(candidate: str) -> str:
    """A candidate's recipe without its stage."""
    return candidate.split("/", 1)[1]


def source(text: str) -> str:
    """A source as named in params, a local path by its last part alone."""
    return f"path:{PurePath(text).name}" if text.startswith("path:") else text


def number(value: float | None, metric: str = "") -> str:
    """A score: three decimals, two of a perplexity above 0.1, none above 1000; a dash if missing."""
    if value is None or pd.isna(value):
        return "–"
    size = abs(value)
    digits = 3 if metric != "perplexity" or size < 0.1 else 2 if size < 1000 else 0
    said = f"{value:,.{digits}f}"
    return said.replace("-", MINUS) if float(said.replace(",", "")) else said.removeprefix("-")


def score(value: float | None, metric: str = "") -> str:
    """A score that was measured, as `number` says it, where a missing one came out as no number."""
    return "NaN" if value is None else number(value, metric)


def signed(value: float, metric: str = "") -> str:
    """A difference with its sign, rounded as `number` does."""
    said = number(value, metric)
    return said if said.startswith(MINUS) else f"+{said}"


def chance(p: float) -> str:
    """A p-value."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def share(value: float) -> str:
    """A share in percent."""
    return f"{round(100 * value):,} %".replace("-", MINUS)


def size(count: float) -> str:
    """Bytes in decimal units."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"
