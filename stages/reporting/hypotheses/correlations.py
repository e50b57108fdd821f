"""Correlation: whether two scores of the same candidates go together.

Judged by all pairings of the candidates' values (`stages.reporting.statistics.correlation`). Given a third
score, the straight line that it explains is taken off both first, and the correlation of the rest is judged
by Student's t with one degree of freedom less (Fisher 1924): pairing residuals errs too often on few models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stages.core.errors import Refusal
from stages.core.lazy import np
from stages.core.schema import Candidate
from stages.reporting.hypotheses.readout import Readout
from stages.reporting.hypotheses.tested import Tested

if TYPE_CHECKING:
    from stages.reporting.hypotheses.cells import Cells, Floats
    from stages.reporting.hypotheses.evidence import Evidence


class CorrelationTest(Tested):
    """Two readouts over candidates that rise together, or one as the other falls."""

    test: Literal["correlation"]
    candidates: Annotated[tuple[Candidate, ...], Field(min_length=4)]
    first: Readout
    second: Readout
    given: Readout | None = None
    ranks: bool = False
    """Correlate ranks in place of values."""
    expect: Literal["positive", "negative"]

    def mistakes(self) -> Iterator[str]:
        if len(set(self.candidates)) < len(self.candidates):
            yield "candidates: one is listed twice; list it once."
        if self.first == self.second or self.given in (self.first, self.second):
            yield "first, second, given: two are the same readout; name another."
        if self.given and len(self.candidates) < 5:
            yield "candidates: a correlation given a third score needs at least five."

    def candidates_read(self) -> Sequence[str]:
        return self.candidates

    def readouts_read(self) -> Sequence[Readout]:
        return [self.first, self.second, *([self.given] if self.given else [])]

    def judge(self, cells: Cells) -> Evidence:
        from scipy import stats

        from stages.reporting.hypotheses.evidence import Evidence
        from stages.reporting.statistics.correlation import correlation
        from stages.reporting.statistics.paired import POWER, Z

        guard = cells.guard(self.reference, self.candidates, self.readouts_read())
        sides = [
            np.array([cells.items(candidate, readout).mean() for candidate in self.candidates])
            for readout in self.readouts_read()
        ]
        freedom = len(self.candidates) - 3 - (self.given is not None)
        if self.given is None:
            test = correlation(sides[0], sides[1], "spearman" if self.ranks else "pearson")
            value, p = test.value, test.p
        else:
            value = partial(*(stats.rankdata(side) if self.ranks else side for side in sides))
            p = float(2 * stats.t.sf(abs(value) * np.sqrt((freedom + 1) / (1 - value**2)), freedom + 1))
        middle, spread = np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12)), 1 / np.sqrt(freedom)
        return Evidence(
            effect=value, low=float(np.tanh(middle - Z * spread)),
            high=float(np.tanh(middle + Z * spread)),
            unit=f"{'rank ' if self.ranks else ''}correlation{' of the rest' if self.given else ''}",
            p=p,
            side="supported" if (value > 0) == (self.expect == "positive") else "contradicted",
            n=len(self.candidates), units="candidates", smallest=float(np.tanh(POWER * spread)),
            floors=guard.floors, blocked=guard.blocked,
        )  # fmt: skip


def partial(first: Floats, second: Floats, given: Floats) -> float:
    """Correlate what a straight line over `given` leaves of two sides, all `[candidates]`.

    Raises:
        Refusal: it leaves nothing of a side, or `given` does not vary.
    """
    if np.ptp(given) == 0:
        raise Refusal("the given score is the same for all candidates, so it explains nothing.")
    left = [side - np.polyval(np.polyfit(given, side, 1), given) for side in (first, second)]
    if any(map(np.allclose, left, (0.0, 0.0))):
        raise Refusal("the given score explains a side whole, so nothing is left to correlate.")
    return float(np.corrcoef(left[0], left[1])[0, 1])
