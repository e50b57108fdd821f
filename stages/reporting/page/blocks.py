"""What a recipe did to each block, and how a loss fell while a model was trained: two of the page's charts.

Both come from the candidates' records: the share of zeros in every block, the error of its outputs on
calibration text (see `stages.compress.drift`), and the held-out losses of every training.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.reporting.words import NEGLIGIBLE, short


def block_rows(records: Mapping[str, Mapping[str, Any]], candidates: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row a block of each candidate: `candidate`, `short`, `block` from 0, `sparsity`, `error`.

    `error` is that of the candidate's own recipe, against the model it was made from; None where the recipe
    reads no text. A candidate without errors and with hardly a zero has no rows.
    """
    rows = []
    for candidate in candidates:
        record = records.get(candidate, {})
        zeros = record.get("sparsity_by_block", [])
        errors = record.get("notes", {}).get(candidate, {}).get("block_errors", {}).get("errors")
        if errors or any((share or 0.0) > NEGLIGIBLE for share in zeros):
            rows += [
                {
                    "candidate": candidate,
                    "short": short(candidate),
                    "block": block,
                    "sparsity": share,
                    "error": errors[block] if errors else None,
                }
                for block, share in enumerate(zeros)
            ]
    return rows


def recovery_curves(records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each held-out loss of each training behind a candidate, each training once.

    Returns:
        `artifact`, `short`, `tokens` trained on, `loss` in nats.
    """
    notes = {name: note for record in records.values() for name, note in record.get("notes", {}).items()}
    return [
        {"artifact": name, "short": short(name), "tokens": tokens, "loss": loss}
        for name, note in sorted(notes.items())
        if "curve" in note
        for tokens, loss in zip(note["curve"]["tokens"], note["curve"]["held_out_loss"], strict=True)
    ]
