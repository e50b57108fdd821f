"""Saturation: the level that a score reaches with ever more training, against a reference.

The candidates are one recipe at several numbers of steps. Their scores are fitted by a - b exp(-x / c)
(`stages.reporting.statistics.saturation`); the effect is a minus the reference's score, over the same drawn
items. It is undecided where the curve does not bend, as its end is then a guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stages.core.lazy import np
from stages.core.schema import Candidate
from stages.reporting.hypotheses.readout import Axis, Readout
from stages.reporting.hypotheses.tested import Tested

if TYPE_CHECKING:
    from stages.reporting.hypotheses.cells import Cells
    from stages.reporting.hypotheses.evidence import Evidence


class SaturationTest(Tested):
    """The plateau of a score, above or below that of the reference by more than `bound`."""

    test: Literal["saturation"]
    readout: Readout
    candidates: Annotated[tuple[Candidate, ...], Field(min_length=4)]
    """One recipe after ever more steps."""
    x: Axis
    """Steps or tokens of training."""
    expect: Literal["above", "below"]
    bound: Annotated[float, Field(allow_inf_nan=False)] = 0.0

    def mistakes(self) -> Iterator[str]:
        if len(set(self.candidates)) < len(self.candidates):
            yield "candidates: one is listed twice; list it once."
        if self.x.values is not None:
            if len(self.x.values) != len(self.candidates):
                count = len(self.candidates)
                yield f"x.values: {len(self.x.values)} given for {count} candidates; give one for each."
            elif len(set(self.x.values)) < 4:
                yield "x.values: a saturating curve needs four different numbers."

    def candidates_read(self) -> Sequence[str]:
        return self.candidates

    def readouts_read(self) -> Sequence[Readout]:
        return [self.readout]

    def measured(self) -> Sequence[tuple[str, int]]:
        return self.x.measured(self.candidates)

    def judge(self, cells: Cells) -> Evidence:
        from stages.reporting.hypotheses.cells import Term, unit_of
        from stages.reporting.hypotheses.effect import Effect, evidence_of
        from stages.reporting.statistics.paired import POWER
        from stages.reporting.statistics.saturation import saturation

        guard = cells.guard(self.reference, self.candidates, [self.readout])
        grid = cells.grid([Term(name, self.readout) for name in (*self.candidates, guard.reference)])
        x = cells.x(self.x, self.candidates)
        curve = saturation(x, grid.values[:, :-1], reference=grid.values[:, -1], seed=0)
        beyond = curve.excess
        value = curve.a - float(grid.values[:, -1].mean())

        def p(bound: float) -> float:
            below = float(((beyond < bound).sum() + (beyond == bound).sum() / 2 + 0.5) / (len(beyond) + 1))
            return 2 * min(below, 1 - below)

        low, high = (float(end) for end in np.quantile(beyond, [0.025, 0.975]))
        effect = Effect(value, low, high, POWER * float(beyond.std(ddof=1)), p)
        finding = evidence_of(
            effect, self.expect, self.bound, unit=unit_of(self.readout), n=len(grid.values), guard=guard
        )
        straight = "" if curve.bends else "the curve does not bend, so its plateau is a guess; train longer"
        return replace(finding, blocked=finding.blocked or straight)
