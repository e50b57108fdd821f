"""SparseGPT (2301.00774): prune column by column and let the later columns compensate.

H, its factor U and the compensation are those of `stages.compress.surgeon`. Every 128 columns the entries
with the lowest |w| / U[j, j] are removed, all rows compared together, the same share each time (the paper's
ranking, whose squares would overflow); under N:M the lowest of every M columns of a row, when these are
reached. With a `grid` the survivors are rounded to it in the same sweep, so that later columns compensate for
both (the paper's joint form). Zeros of the source stay zero.

Weights whose input was zero on every token cost nothing by this measure and compensate for nothing. They are
removed first, the smallest of them first, but never more than the sparsity asks for: the exact count rules.
The paper's code zeroes all of them.
"""

from __future__ import annotations

from math import gcd, lcm
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from stages.compress.rounding import Rounding
from stages.compress.select import extend_overall, smallest_in_groups, smallest_overall
from stages.compress.statistics import Hessian
from stages.compress.surgeon import COLUMNS, check_errors, side_by_side, sweep
from stages.core.lazy import torch
from stages.core.schema import Strict
from stages.corpus.windows import Calibration
from stages.model.blocks import check_divides, linears
from stages.model.grid import Codes, Integers
from stages.pruning.pruner import Pruner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from stages.model.blocks import Linear
    from stages.model.source import Empty


class Grid(Strict):
    """A symmetric integer grid to round the survivors to."""

    bits: Annotated[int, Field(ge=2, le=8)]
    group_size: Annotated[int, Field(ge=8)] | None
    """Input columns that share a scale; null: one scale per row."""


class SparseGPT(Pruner):
    """Zero the share `sparsity` of each linear, compensating through the inverse Hessian."""

    method: Literal["sparsegpt"]
    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the Hessian's mean diagonal added to it."""
    grid: Grid | None = None
    calibration: Calibration

    statistic = Hessian
    on_dead = "the first to go, as far as the sparsity reaches"

    def plan(self, source: Empty, windows: Callable[[], Tensor]) -> dict[str, int]:
        """Return the number of zeros of each linear.

        Raises:
            Refusal: M of N:M or the grid's group_size does not divide the input width of some linears.
        """
        if self.grid and (size := self.grid.group_size):
            cure = "set a divisor of every input width, or null for one scale per row"
            check_divides(f"the grid's group_size {size}", size, linears(source.model, self.ignore), cure)
        return super().plan(source, windows)

    def notes(self, plan: dict[str, int]) -> dict[str, Any]:
        """Add the number of quantized linears if there is a grid."""
        return super().notes(plan) | ({"quantized_linears": len(plan)} if self.grid else {})

    def replace_group(
        self, linears: Sequence[Linear], statistic: Hessian, plan: dict[str, int]
    ) -> Iterator[Tensor | Codes]:
        """Yield the new weights of linears that share their inputs; they are swept side by side."""
        zeros = [plan[linear.name] for linear in linears]
        return self._swept([linear.weight for linear in linears], statistic, zeros)

    def weights(self, weight: Tensor, statistic: Hessian, zeros: int) -> Tensor | Codes:
        """Prune `weight` `[out, in]` and update the survivors; return codes if there is a grid.

        Raises:
            Refusal: the damped Hessian is not positive definite, or errors overflow.
        """
        return next(self._swept([weight], statistic, [zeros]))

    def _swept(
        self, weights: Sequence[Tensor], statistic: Hessian, zeros: Sequence[int]
    ) -> Iterator[Tensor | Codes]:
        factor = statistic.inverse_factor(self.damping)
        work, parts = side_by_side(weights)
        columns, dtype, pattern = len(work), weights[0].dtype, self.pattern
        gone = work == 0
        dead = statistic.dead()[:, None] if statistic.dead().any() else None
        if dead is not None and not pattern:
            for rows, count in zip(parts, zeros, strict=True):
                before = gone[:, rows]
                scores = work[:, rows].abs().masked_fill(~dead, torch.inf)
                spare = min(count, int((before | dead).sum()))
                gone[:, rows] = extend_overall(scores, before, spare)
        rounding = None
        if self.grid:
            rounding = Rounding(Integers(self.grid.bits, self.grid.group_size), work, dtype)
        # All columns that are ranked or scaled together must be up to date at the same time.
        scaled = rounding.size if rounding and rounding.size < columns else 0
        unit = lcm(pattern[1] if pattern else 1, scaled or 1)
        panel = unit * max(1, COLUMNS // unit)
        ranked = pattern[1] if pattern else panel
        totals = [
            zeros_by_panel(gone[:, rows], count, panel) for rows, count in zip(parts, zeros, strict=True)
        ]

        def choose(start: int) -> None:
            here = slice(start, start + ranked)
            scores = work[here].abs() / factor.diagonal()[here, None]
            if pattern:
                if dead is not None:  # below all other scores, and ascending with |w|
                    scores = torch.where(dead[here], -1 / (1 + work[here].abs()), scores)
                scores = scores.masked_fill(gone[here], -2).T
                gone[here] |= smallest_in_groups(scores, *pattern).T
                return
            scores = scores.masked_fill_(gone[here], -torch.inf)
            for rows, total in zip(parts, totals, strict=True):
                gone[here, rows] = smallest_overall(scores[:, rows].T, total[start // panel]).T

        def begin(start: int) -> None:
            if start % ranked == 0:
                choose(start)
            if rounding and start % rounding.size == 0:
                group = slice(start, start + rounding.size)
                rounding.fit(start // rounding.size, work[group].masked_fill(gone[group], 0))

        worst = sweep(work, factor, gone, rounding, begin=begin, unit=gcd(ranked, scaled), panel=panel)
        for rows in parts:
            check_errors(worst[rows])
            yield rounding.result(rows) if rounding else work[:, rows].T.to(dtype).contiguous()


def zeros_by_panel(gone: Tensor, zeros: int, panel: int) -> list[int]:
    """Return how many entries of each `panel` columns are to be gone, `zeros` in all or what is gone already.

    Every panel ends with the same share of zeros; if some start with more, the others lose less.

    Args:
        gone: `[in, out]` bool, the entries that are zero already.
    """
    columns, by_column = len(gone), gone.sum(1).tolist()
    starts = range(0, columns, panel)
    existing = [sum(by_column[start : start + panel]) for start in starts]
    targets = [zeros * min(start + panel, columns) // columns for start in starts]
    missing = [max(b - a - n, 0) for a, b, n in zip([0, *targets], targets, existing, strict=False)]
    wanted = max(zeros - sum(existing), 0)
    sums = [wanted * sum(missing[: i + 1]) // max(sum(missing), 1) for i in range(len(missing))]
    return [n + b - a for n, a, b in zip(existing, [0, *sums], sums, strict=False)]
