"""Trend: whether a score falls from candidate to candidate, or a loss grows from level to level.

- Over candidates, or over budgets of one candidate, the same items are answered under each condition: Page's
  test with items as blocks. Its effect is the slope against `x`, or a step.
- Over levels the items differ. The loss of each level is compared with the reference; if level did not
  matter, any item could stand at any level, so items are permuted among levels, both answers of an item
  together, and the slope of the loss over the levels is judged against the slopes of the permutations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stages.core.schema import Candidate
from stages.reporting.hypotheses.readout import Axis, Readout, repeated
from stages.reporting.hypotheses.tested import Tested

if TYPE_CHECKING:
    from stages.reporting.hypotheses.cells import Cells
    from stages.reporting.hypotheses.finding import Finding


class TrendTest(Tested):
    """A score over candidates or budgets, or a loss over levels, that rises or falls."""

    test: Literal["trend"]
    readout: Readout
    candidates: Annotated[tuple[Candidate, ...], Field(min_length=1)]
    """The conditions in order; with levels, the candidates whose mean loss is read."""
    levels: tuple[str, ...] = ()
    """Levels in order; the loss against the reference is read at each."""
    budgets: tuple[int, ...] = ()
    """Budgets in order, of a single candidate."""
    loss: Literal["points", "share"] = "share"
    """With levels: the loss in points, or as a share of what the reference has above its floor."""
    x: Axis | None = None
    """The numbers that the slope is against; null: 1, 2, 3, ..."""
    expect: Literal["rises", "falls"]

    def mistakes(self) -> Iterator[str]:
        yield from repeated(self.readout, budget=bool(self.budgets), level=bool(self.levels))
        axes = [axis for axis in (self.levels, self.budgets) if axis]
        if len(axes) > 1:
            yield "levels, budgets: a trend runs along one of them; leave the other out."
            return
        axis = axes[0] if axes else self.candidates
        if len(axis) < 3:
            yield f"a trend needs three or more conditions, not {len(axis)}; add candidates, levels or budgets."
        if len(set(axis)) < len(axis):
            yield "a condition is listed twice; list it once."
        if self.budgets and len(self.candidates) > 1:
            yield "candidates: budgets are compared within one candidate; name only one."
        if self.x and self.x.values is not None and len(self.x.values) != len(axis):
            yield f"x.values: {len(self.x.values)} given for {len(axis)} conditions; give one for each."
        if axes and self.x and self.x.column:
            yield "x.column: a column differs between candidates only; give values."

    def candidates_read(self) -> Sequence[str]:
        return self.candidates

    def readouts_read(self) -> Sequence[Readout]:
        levels = [self.readout.model_copy(update={"level": level}) for level in self.levels]
        budgets = [self.readout.model_copy(update={"budget": budget}) for budget in self.budgets]
        return [*levels, *budgets] or [self.readout]

    def judge(self, cells: Cells) -> Finding:
        raise NotImplementedError
