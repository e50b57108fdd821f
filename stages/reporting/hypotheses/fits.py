"""Fit: which of two numbers explains the scores of candidates better, across bases.

Each candidate's score is predicted by a straight line (or a parabola) through all others, once over each
number. The effect is how much smaller the squared errors of the first are; candidates are the units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stages.core.schema import Candidate
from stages.reporting.hypotheses.readout import Axis, Readout
from stages.reporting.hypotheses.tested import Tested

if TYPE_CHECKING:
    from stages.reporting.hypotheses.cells import Cells
    from stages.reporting.hypotheses.finding import Finding


class FitTest(Tested):
    """The number `better` explains scores better than `worse` does."""

    test: Literal["fit"]
    readout: Readout
    candidates: Annotated[tuple[Candidate, ...], Field(min_length=8)]
    better: Axis
    worse: Axis
    degree: Annotated[int, Field(ge=1, le=2)] = 1
    """1: a straight line; 2: a parabola."""
    share: bool = False
    """Read each score as the share of its own dense base's above the floor."""

    def mistakes(self) -> Iterator[str]:
        for name, axis in (("better", self.better), ("worse", self.worse)):
            if axis.values is not None and len(axis.values) != len(self.candidates):
                count = len(self.candidates)
                yield f"{name}.values: {len(axis.values)} given for {count} candidates; give one for each."

    def candidates_read(self) -> Sequence[str]:
        return self.candidates

    def readouts_read(self) -> Sequence[Readout]:
        return [self.readout]

    def judge(self, cells: Cells) -> Finding:
        raise NotImplementedError
