"""SparseGPT (2301.00774): prune column by column and let the columns still to come make up for it.

H, its factor U and the compensation are those of `stages.compress.surgeon`. Every 128 columns the entries
with the lowest |w| / U[j, j], all rows together, are chosen to go, the same share every time (the paper's
order; its squares overflow); under N:M the lowest of every M columns of a row, when these are reached. With
a `grid` the survivors are rounded to it in the same sweep, so that later columns make up for both (the
paper's joint form). What is zero in the source stays zero.

Weights whose input was zero on every token cost nothing by this measure and make up for nothing. They are
the first to go, the smallest of them first, but no more of them than are to go at all: the exact count
rules. The paper's code zeroes every one, however many there are.
"""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from stages.compress.select import grown, smallest_in_groups
from stages.compress.statistics import Hessian
from stages.compress.surgeon import COLUMNS, sweep
from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.schema import Strict
from stages.corpus.windows import Calibration
from stages.model.grid import Codes, round_to_codes, scale_of
from stages.pruning.pruner import Pruner

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from stages.model.stream import Empty


class Grid(Strict):
    """A symmetric integer grid to round the survivors to."""

    bits: Annotated[int, Field(ge=2, le=8)]
    group_size: Annotated[int, Field(ge=8)] | None
    """Input columns that share a scale; null: one a row."""


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
        """Zeros of each linear.

        Raises:
            Refusal: M of N:M or the grid's group_size does not divide some linears' inputs.
        """
        from stages.model.blocks import linears

        size = (self.grid.group_size if self.grid else None) or 1
        found = linears(source.model, self.ignore)
        if uneven := [one.name for one in found if one.weight.shape[1] % size]:
            raise Refusal(
                f"the grid's group_size {size} does not divide the input of {len(uneven)} linears: "
                f"{', '.join(uneven[:8])}; take a divisor of every input width, or null for one scale a row."
            )
        return super().plan(source, windows)

    def notes(self, plan: dict[str, int]) -> dict[str, Any]:
        """With a grid also how many linears were quantized, for whoever counts them in the file."""
        return super().notes(plan) | ({"quantized_linears": len(plan)} if self.grid else {})

    def weights(self, weight: Tensor, statistic: Hessian, zeros: int) -> Tensor | Codes:
        """Prune `weight` `[out, in]`; survivors are updated. Codes where there is a grid.

        Raises:
            Refusal: the damped Hessian is not positive definite.
        """
        factor = statistic.inverse_factor(self.damping)
        columns, rows = weight.shape[1], weight.shape[0]
        work = weight.float().T.contiguous()
        gone = work == 0
        dead = statistic.dead()[:, None] if statistic.dead().any() else None
        if dead is not None and not self.pattern:
            spare = min(zeros, int((gone | dead).sum()))
            gone = grown(work.abs().masked_fill(~dead, torch.inf), gone, spare)
        size = (self.grid.group_size if self.grid else None) or columns
        # Columns that are chosen or scaled together are up to date together.
        together = lcm(self.pattern[1] if self.pattern else 1, size if size < columns else 1)
        run = together * max(1, COLUMNS // together)
        further = to_go(gone, zeros, run)
        scales: list[Tensor] = []
        codes = torch.zeros(columns, rows, dtype=torch.int8, device=weight.device)

        def choose(start: int, stop: int, now: Tensor) -> None:
            scores = now[start:stop].abs() / factor.diagonal()[start:stop, None]
            had = gone[start:stop].T
            count = int(had.sum()) + further[start // run]
            gone[start:stop] = grown(scores.T, had, count).T

        def settle(j: int, column: Tensor) -> Tensor:
            if self.pattern and j % self.pattern[1] == 0:
                group = slice(j, j + self.pattern[1])
                scores = work[group].abs() / factor.diagonal()[group, None]
                if dead is not None:  # below all others, and ascending with |w|
                    scores = torch.where(dead[group], -1 / (1 + work[group].abs()), scores)
                scores = scores.masked_fill(gone[group], -2).T
                gone[group] |= smallest_in_groups(scores, *self.pattern).T
            value = column * ~gone[j]
            if self.grid is None:
                return value
            if j % size == 0:
                group = slice(j, j + size)
                scales.append(scale_of((work[group] * ~gone[group]).T, self.grid.bits, weight.dtype)[:, 0])
            code = round_to_codes(value, scales[-1], self.grid.bits)
            codes[j] = code.to(torch.int8)
            return (code * scales[-1]).to(weight.dtype).float()

        sweep(work, factor, settle, begin=None if self.pattern else choose, run=run)
        if self.grid is None:
            return work.T.to(weight.dtype).masked_fill(gone.T, 0)
        scale = torch.stack(scales, 1).to(weight.dtype)
        return Codes(codes.T.contiguous(), scale, self.grid.bits, self.grid.group_size)


def to_go(gone: Tensor, zeros: int, run: int) -> list[int]:
    """How many entries of each `run` columns are still to go, so that `zeros` of all are gone in the end.

    Each run ends with the same share, but where it had more from the start: then the others lose less.

    Args:
        gone: `[in, out]` bool, what is zero already.
    """
    columns = len(gone)
    stops = [min(start + run, columns) for start in range(0, columns, run)]
    there = [int(part.sum()) for part in gone.split(run)]
    shares = [zeros * stop // columns for stop in stops]
    lacking = [max(b - a - n, 0) for a, b, n in zip([0, *shares], shares, there, strict=False)]
    wanted = max(zeros - sum(there), 0)
    sums = [wanted * sum(lacking[: i + 1]) // max(sum(lacking), 1) for i in range(len(lacking))]
    return [b - a for a, b in zip([0, *sums], sums, strict=False)]
