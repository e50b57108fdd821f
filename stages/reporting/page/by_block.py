"""What a recipe did to each block, and how a loss fell while a model was trained: two of the page's charts.

Both come from the candidates' records: the share of zeros in every block, the error of its outputs on
calibration text (see `stages.compress.drift`), and the held-out losses of every training.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from stages.reporting.words import NEGLIGIBLE, short


def block_rows(records: Mapping[str, Mapping[str, Any]], candidates: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row a block of each candidate: `artifact`, `name`, `block` from 0, `sparsity`, `error`.

    `error` is that of the candidate's own recipe, against the model it was made from; None where the recipe
    reads no text or the error is not finite. A candidate without errors and with hardly a zero has no rows.
    """
    rows = []
    for candidate in candidates:
        record = records.get(candidate, {})
        zeros = record.get("sparsity_by_block", [])
        errors = _errors(record, candidate)
        if errors or any((share or 0.0) > NEGLIGIBLE for share in zeros):
            rows += [
                {"artifact": candidate, "block": block, "sparsity": share, "error": error}
                for block, (share, error) in enumerate(zip_longest(zeros, errors))
            ]
    return _named(rows)


def recovery_curves(records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each held-out loss of each training behind a candidate, each training once.

    Returns:
        `artifact`, `name`, `tokens` trained on, `loss` in nats.
    """
    notes = {name: note for record in records.values() for name, note in record.get("notes", {}).items()}
    return _named(
        {"artifact": name, "tokens": tokens, "loss": loss}
        for name, note in sorted(notes.items())
        if "curve" in note
        for tokens, loss in zip(note["curve"]["tokens"], note["curve"]["held_out_loss"], strict=True)
    )


def not_finite(records: Mapping[str, Mapping[str, Any]], candidates: Sequence[str]) -> list[tuple[str, str]]:
    """Return the candidates some of whose blocks have an error that is not finite, and these blocks."""
    blocks = {
        name: [
            str(block) for block, error in enumerate(_errors(records.get(name, {}), name)) if error is None
        ]
        for name in candidates
    }
    return [(name, ", ".join(numbers)) for name, numbers in blocks.items() if numbers]


def by_artifact(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, list[Any]]:
    """Return the values of a column by name, in order; only of names that have one."""
    values: dict[str, list[Any]] = {}
    for row in rows:
        values.setdefault(row["name"], []).append(row[column])
    return {name: listed for name, listed in values.items() if any(_is_number(value) for value in listed)}


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _errors(record: Mapping[str, Any], candidate: str) -> list[float | None]:
    noted = record.get("notes", {}).get(candidate, {}).get("block_errors", {})
    errors: list[float | None] = noted.get("errors", [])
    return errors


def _named(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add `name`, the short name of an artifact where no other has it, and the whole one elsewhere."""
    kept = list(rows)
    counts = Counter(short(artifact) for artifact in {row["artifact"] for row in kept})
    return [
        row | {"name": short(row["artifact"]) if counts[short(row["artifact"])] == 1 else row["artifact"]}
        for row in kept
    ]
