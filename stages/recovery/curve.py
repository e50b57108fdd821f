"""The learning curve: a row a step, in a file that DVC plots.

Only what is computed is in it, no time of day and no speed, so that equal inputs give equal bytes.
"""

import csv
import io
from dataclasses import asdict, dataclass, fields

from stages.core.files import CURVES, write_text


@dataclass(frozen=True)
class Point:
    """Where training is after `step` steps; 0 is the source itself."""

    step: int
    tokens: int
    """Attended tokens trained on up to here, padding not among them."""
    learning_rate: float | None
    """Of this step."""
    train_loss: float | None
    """Mean over the step's predicted tokens, before the step's change of weights; of the whole objective."""
    heldout_loss: float | None
    """Mean cross entropy over the predicted tokens held out, in nats, after the step; where it is taken."""


def write(points: list[Point], recipe: str) -> None:
    """Write data/curves/<recipe>.csv, whole or not at all; what was not taken is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Point)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    write_text(CURVES / f"{recipe}.csv", text.getvalue())
