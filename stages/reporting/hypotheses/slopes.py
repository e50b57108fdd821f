"""Slope: how fast a score changes with a number, or how much faster on one line than on another.

A line runs over candidates (against a column, such as `sparsity`), or over budgets or levels of a candidate.
The least-squares slope of mean scores is a weighted sum of them, so it is judged as a contrast is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.core.lazy import np
from stages.core.schema import Candidate, Strict
from stages.reporting.hypotheses.readout import Axis, Readout, repeated
from stages.reporting.hypotheses.tested import Tested

if TYPE_CHECKING:
    from stages.reporting.hypotheses.cells import Cells
    from stages.reporting.hypotheses.evidence import Evidence


class Line(Strict):
    """The points of a line: several candidates, or one at several budgets or levels."""

    candidates: Annotated[tuple[Candidate, ...], Field(min_length=1)]
    budgets: tuple[int, ...] = ()
    levels: tuple[str, ...] = ()
    x: Axis

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        long = [points for points in (self.budgets, self.levels) if points]
        if len(long) > 1 or (long and len(self.candidates) > 1):
            raise ValueError("a line runs over candidates, budgets or levels, one of them")
        points = long[0] if long else self.candidates
        if len(points) < 2:
            raise ValueError("a line needs at least two points")
        if self.x.values is not None and len(self.x.values) != len(points):
            raise ValueError(f"x.values needs {len(points)} numbers, one a point")
        if long and self.x.column:
            raise ValueError("x.column differs between candidates only; give x.values")
        return self


class SlopeTest(Tested):
    """The slope of one line, or the first line's minus the second's, against a bound."""

    test: Literal["slope"]
    readout: Readout
    lines: Annotated[tuple[Line, ...], Field(min_length=1, max_length=2)]
    expect: Literal["above", "below", "within"]
    bound: Annotated[float, Field(allow_inf_nan=False)] = 0.0

    @model_validator(mode="after")
    def _wide(self) -> Self:
        if self.expect == "within" and self.bound <= 0:
            raise ValueError("within needs a bound above 0")
        return self

    @model_validator(mode="after")
    def _same_scale(self) -> Self:
        if len({line.x.log2 for line in self.lines}) > 1:
            raise ValueError("both lines need the same log2")
        return self

    def mistakes(self) -> Iterator[str]:
        yield from repeated(
            self.readout,
            budget=any(line.budgets for line in self.lines),
            level=any(line.levels for line in self.lines),
        )
        for place, line in enumerate(self.lines):
            points = line.budgets or line.levels or line.candidates
            if len(set(points)) < len(points):
                yield f"lines.{place}: a point is listed twice; list it once."
            if line.x.values is not None and len(set(line.x.values)) < 2:
                yield f"lines.{place}.x.values: all the same; a slope needs two different numbers."

    def candidates_read(self) -> Sequence[str]:
        return [name for line in self.lines for name in line.candidates]

    def readouts_read(self) -> Sequence[Readout]:
        wanted = []
        for line in self.lines:
            wanted += [self.readout.model_copy(update={"budget": budget}) for budget in line.budgets]
            wanted += [self.readout.model_copy(update={"level": level}) for level in line.levels]
        return wanted or [self.readout]

    def measured(self) -> Sequence[tuple[str, int]]:
        return [pair for line in self.lines for pair in line.x.measured(line.candidates)]

    def judge(self, cells: Cells) -> Evidence:
        from stages.reporting.hypotheses.cells import Term, unit_of
        from stages.reporting.hypotheses.effect import evidence_of, weighted_sum
        from stages.reporting.hypotheses.repeats import over_repeats

        weights: dict[Term, float] = {}
        for sign, line in zip((1.0, -1.0), self.lines, strict=False):
            terms = [Term(candidate, readout) for candidate, readout in self._points(line)]
            x = cells.x(line.x, line.candidates)
            steps = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
            for term, step in zip(terms, steps, strict=True):
                weights[term] = weights.get(term, 0.0) + sign * float(step)
        grid = cells.grid(list(weights))
        factors = np.array(list(weights.values()))
        names = self.candidates_read()
        axis = self.lines[0].x
        per = f"{'doubling' if axis.log2 else '1'} of {axis.column or 'x'}"
        return evidence_of(
            weighted_sum(grid, factors),
            self.expect,
            self.bound,
            unit=f"{unit_of(self.readout)} per {per}",
            n=len(grid.values),
            guard=cells.guard(
                self.reference,
                names,
                self._guarded(),
                interaction=any(line.levels for line in self.lines),
            ),
            repeats=over_repeats(
                cells, list(weights), grid.means(), lambda means: np.asarray(means @ factors)
            ),
        )

    def _guarded(self) -> list[Readout]:
        """Return the readouts, at the largest budget that is read: with little thinking little is right."""
        budgets = [budget for line in self.lines for budget in line.budgets]
        if budgets:
            return [self.readout.model_copy(update={"budget": max(budgets)})]
        return list(self.readouts_read())

    def _points(self, line: Line) -> list[tuple[str, Readout]]:
        """Return the candidate and readout of each point."""
        fields = {"budget": line.budgets, "level": line.levels}
        for name, values in fields.items():
            if values:
                return [
                    (line.candidates[0], self.readout.model_copy(update={name: value})) for value in values
                ]
        return [(candidate, self.readout) for candidate in line.candidates]
