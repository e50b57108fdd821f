"""Read an effect over the repeats of its recipes: the same recipe made again on other draws of its text.

`report.noise` names which candidates are repeats of each other. The mean of the repeats replaces each
candidate of an effect, and their spread, carried through the effect by its slope in every score, is the error
of that (`stages.reporting.statistics.luck`). The claim must hold so, too: items show how surely this model
differs, repeats how surely its method does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from stages.reporting.statistics.luck import Luck, luck_of

if TYPE_CHECKING:
    from stages.reporting.hypotheses.cells import Cells, Floats, Term

_STEP = 1e-5


def over_repeats(
    cells: Cells, terms: Sequence[Term], means: Floats, statistic: Callable[[Floats], Floats]
) -> Luck | None:
    """Return the effect over repeats; None if no candidate has any, or agreement is read in place of scores.

    Args:
        means: `[terms]`, the mean score of each.
        statistic: from the means of terms `[..., terms]` to the effect `[...]`.
    """
    scores: dict[int, Floats] = {
        place: np.array([float(cells.items(name, term.readout).mean()) for name in names])
        for place, term in enumerate(terms)
        if (names := cells.repeats(term.candidate))
    }
    if not scores or any(term.agrees_with for term in terms):
        return None
    center = np.array(means, np.float64)
    for place, repeated in scores.items():
        center[place] = repeated.mean()
    shares: dict[tuple[str, ...], Floats] = {}
    for place, repeated in scores.items():
        step = np.zeros_like(center)
        step[place] = _STEP * max(1.0, abs(center[place]))
        slope = (statistic(center + step) - statistic(center - step)) / (2 * step[place])
        group = cells.repeats(terms[place].candidate)
        shares[group] = shares.get(group, np.zeros(len(group))) + slope * repeated
    return luck_of(float(statistic(center)), list(shares.values()))
