"""The learning curve: one row per step, in a file that DVC plots.

It holds computed numbers only, no times and no speeds, so that equal inputs give equal bytes.
"""

import csv
import io
from dataclasses import asdict, dataclass, fields
from typing import Any

from stages.core.files import CURVES, write_text


@dataclass(frozen=True)
class Point:
    """The state of training after `step` steps; step 0 is the source itself."""

    step: int
    tokens: int
    """Attended tokens trained on so far; padding does not count."""
    learning_rate: float | None
    """Of this step."""
    train_loss: float | None
    """Mean of the whole objective over the step's predicted tokens, before the step changes the weights."""
    heldout_loss: float | None
    """Mean cross entropy over the held-out predicted tokens, in nats, after the step, where computed."""


def held_out_curve(points: list[Point]) -> dict[str, list[Any]]:
    """Return `tokens` trained on and `held_out_loss` in nats at the steps where the loss was computed."""
    computed = [point for point in points if point.heldout_loss is not None]
    return {
        "tokens": [point.tokens for point in computed],
        "held_out_loss": [point.heldout_loss for point in computed],
    }


def write_curve(points: list[Point], recipe: str) -> None:
    """Write data/curves/<recipe>.csv, whole or not at all; None becomes an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Point)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    write_text(CURVES / f"{recipe}.csv", text.getvalue())
