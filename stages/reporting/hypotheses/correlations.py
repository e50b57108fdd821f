"""Correlation: whether two scores of the same candidates go together.

Judged by all pairings of the candidates' values (`stages.reporting.statistics.correlation`). Given a third
score, what it explains is taken off both first, and the rest is paired (Freedman and Lane 1983).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stages.core.schema import Candidate
from stages.reporting.hypotheses.readout import Readout
from stages.reporting.hypotheses.tested import Tested

if TYPE_CHECKING:
    from stages.reporting.hypotheses.cells import Cells
    from stages.reporting.hypotheses.finding import Finding


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
        if self.given and len(self.candidates) < 5:
            yield "candidates: a correlation given a third score needs at least five."

    def candidates_read(self) -> Sequence[str]:
        return self.candidates

    def readouts_read(self) -> Sequence[Readout]:
        return [self.first, self.second, *([self.given] if self.given else [])]

    def judge(self, cells: Cells) -> Finding:
        raise NotImplementedError
