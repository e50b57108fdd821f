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

from stages.core.errors import Refusal
from stages.core.lazy import np
from stages.core.schema import Candidate
from stages.reporting.hypotheses.readout import Axis, Readout, repeated
from stages.reporting.hypotheses.tested import Tested

if TYPE_CHECKING:
    from stages.reporting.hypotheses.cells import Cells, Floats, Guard, ItemGrid
    from stages.reporting.hypotheses.evidence import Evidence


class TrendTest(Tested):
    """A score over candidates or budgets, or a loss over levels, that rises or falls."""

    test: Literal["trend"]
    readout: Readout
    candidates: Annotated[tuple[Candidate, ...], Field(min_length=1)]
    """The conditions, in order if there is no `x`; with levels, the candidates whose mean loss is read."""
    levels: tuple[str, ...] = ()
    """Levels in order; the loss against the reference is read at each."""
    budgets: tuple[int, ...] = ()
    """Budgets in order, of a single candidate."""
    loss: Literal["points", "share"] = "share"
    """With levels: the loss in points, or as a share of what the reference has above its floor."""
    x: Axis | None = None
    """The numbers that order the conditions, and that the slope is against; null: 1, 2, 3, ..."""
    expect: Literal["rises", "falls"]

    def mistakes(self) -> Iterator[str]:
        yield from repeated(self.readout, budget=bool(self.budgets), level=bool(self.levels))
        axes = [axis for axis in (self.levels, self.budgets) if axis]
        if len(axes) > 1:
            yield "levels, budgets: a trend runs along one of them; leave the other out."
            return
        axis = axes[0] if axes else self.candidates
        if len(axis) < 3:
            yield f"a trend needs three conditions or more, not {len(axis)}; add some."
        if len(set(axis)) < len(axis):
            yield "a condition is listed twice; list it once."
        if self.budgets and len(self.candidates) > 1:
            yield "candidates: budgets are compared within one candidate; name only one."
        if self.x and self.x.values is not None:
            if len(self.x.values) != len(axis):
                yield f"x.values: {len(self.x.values)} given for {len(axis)} conditions; give one for each."
            elif len(set(self.x.values)) < len(axis):
                yield "x.values: a number is given twice; a trend needs another for each condition."
        if axes and self.x and self.x.column:
            yield "x.column: a column differs between candidates only; give values."

    def candidates_read(self) -> Sequence[str]:
        return self.candidates

    def readouts_read(self) -> Sequence[Readout]:
        levels = [self.readout.model_copy(update={"level": level}) for level in self.levels]
        budgets = [self.readout.model_copy(update={"budget": budget}) for budget in self.budgets]
        return [*levels, *budgets] or [self.readout]

    def measured(self) -> Sequence[tuple[str, int]]:
        return self.x.measured(self.candidates) if self.x else []

    def judge(self, cells: Cells) -> Evidence:
        from stages.reporting.hypotheses.cells import Term

        guard = cells.guard(
            self.reference,
            self.candidates,
            self.readouts_read(),
            interaction=bool(self.levels) and self.loss == "points",
        )
        if self.levels:
            return self._over_levels(cells, guard)
        points = (
            [Term(self.candidates[0], readout) for readout in self.readouts_read()]
            if self.budgets
            else [Term(candidate, self.readout) for candidate in self.candidates]
        )
        grid = cells.grid(points)
        return self._over_blocks(grid, cells, guard)

    def _steps(self, cells: Cells, count: int) -> Floats:
        """Return the x of each condition.

        Raises:
            Refusal: two conditions have the same.
        """
        x = cells.x(self.x, self.candidates) if self.x else np.arange(1.0, count + 1)
        if len(set(x.tolist())) < len(x):
            raise Refusal("two conditions have the same x, so they have no order.")
        return x

    def _over_blocks(self, grid: ItemGrid, cells: Cells, guard: Guard) -> Evidence:
        """Test whether scores rise or fall along the conditions within items (Page)."""
        from stages.reporting.hypotheses.cells import unit_of
        from stages.reporting.hypotheses.effect import weighted_sum
        from stages.reporting.hypotheses.evidence import Evidence
        from stages.reporting.statistics.trend import page

        x = self._steps(cells, grid.values.shape[1])
        slope = weighted_sum(grid, (x - x.mean()) / ((x - x.mean()) ** 2).sum())
        ordered = grid.values[:, np.argsort(x)]
        rise, fall = page(ordered).p, page(ordered[:, ::-1]).p
        rises = rise < fall
        return Evidence(
            effect=slope.value, low=slope.low, high=slope.high,
            unit=f"{unit_of(self.readout)} per {self._step()}",
            p=min(1.0, 2 * min(rise, fall)),
            side="supported" if rises == (self.expect == "rises") else "contradicted",
            n=len(grid.values), smallest=slope.smallest, floors=guard.floors, blocked=guard.blocked,
        )  # fmt: skip

    def _over_levels(self, cells: Cells, guard: Guard) -> Evidence:
        """Test whether the loss against the reference grows along levels, by permuting items among them."""
        from stages.reporting.hypotheses.cells import Term
        from stages.reporting.hypotheses.effect import permuted
        from stages.reporting.hypotheses.evidence import Evidence
        from stages.reporting.statistics.paired import POWER, Z

        names = [guard.reference, *self.candidates]
        parts = [
            cells.grid([Term(name, readout) for name in names]).values for readout in self.readouts_read()
        ]
        whole, ours = (np.concatenate(side) for side in zip(*(self._sides(p) for p in parts), strict=True))
        if self.loss == "share":
            floors = [cells.needed_floor(guard.reference, readout) for readout in self.readouts_read()]
            floor = np.repeat(floors, [len(part) for part in parts])
            whole, ours = whole - floor, ours - floor
        strata = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        x = self._steps(cells, len(parts))
        factors = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
        # A loss grows as fast as what is kept shrinks.
        test = permuted(whole - ours, factors, strata, whole if self.loss == "share" else None)
        lost = "share of the reference" if self.loss == "share" else "share right"
        return Evidence(
            effect=test.value, low=test.value - Z * test.stderr, high=test.value + Z * test.stderr,
            unit=f"{lost} lost per {self._step()}",
            p=test.p,
            side="supported" if (test.value > 0) == (self.expect == "rises") else "contradicted",
            n=len(whole), smallest=POWER * test.stderr, floors=guard.floors, blocked=guard.blocked,
        )  # fmt: skip

    def _sides(self, values: Floats) -> tuple[Floats, Floats]:
        """Return the reference's scores and the mean of the others."""
        return values[:, 0], values[:, 1:].mean(axis=1)

    def _step(self) -> str:
        if self.x is None:
            return "step"
        return f"{'doubling' if self.x.log2 else '1'} of {self.x.column or 'x'}"
