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

from math import lcm
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from stages.compress.select import extend_overall, smallest_in_groups
from stages.compress.statistics import Hessian
from stages.compress.surgeon import COLUMNS, sweep
from stages.core.lazy import torch
from stages.core.schema import Strict
from stages.corpus.windows import Calibration
from stages.model.blocks import check_divides, linears
from stages.model.grid import Codes, round_to_codes, scale_of
from stages.pruning.pruner import Pruner

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

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

    def weights(self, weight: Tensor, statistic: Hessian, zeros: int) -> Tensor | Codes:
        """Prune `weight` `[out, in]` and update the survivors; return codes if there is a grid.

        Raises:
            Refusal: the damped Hessian is not positive definite.
        """
        factor = statistic.inverse_factor(self.damping)
        rows, columns = weight.shape
        work = weight.float().T.contiguous()
        gone = work == 0
        dead = statistic.dead()[:, None] if statistic.dead().any() else None
        if dead is not None and not self.pattern:
            count = min(zeros, int((gone | dead).sum()))
            gone = extend_overall(work.abs().masked_fill(~dead, torch.inf), gone, count)
        group_size = (self.grid.group_size if self.grid else None) or columns
        # All columns that are ranked or scaled together must be up to date at the same time.
        unit = lcm(self.pattern[1] if self.pattern else 1, group_size if group_size < columns else 1)
        panel = unit * max(1, COLUMNS // unit)
        more = zeros_by_panel(gone, zeros, panel)
        scales: list[Tensor] = []
        codes = torch.zeros(columns, rows, dtype=torch.int8, device=weight.device)

        def choose(start: int, stop: int, now: Tensor) -> None:
            scores = now[start:stop].abs() / factor.diagonal()[start:stop, None]
            before = gone[start:stop].T
            gone[start:stop] = extend_overall(scores.T, before, int(before.sum()) + more[start // panel]).T

        def settle(j: int, column: Tensor) -> Tensor:
            if self.pattern and j % self.pattern[1] == 0:
                group = slice(j, j + self.pattern[1])
                scores = work[group].abs() / factor.diagonal()[group, None]
                if dead is not None:  # below all other scores, and ascending with |w|
                    scores = torch.where(dead[group], -1 / (1 + work[group].abs()), scores)
                scores = scores.masked_fill(gone[group], -2).T
                gone[group] |= smallest_in_groups(scores, *self.pattern).T
            value = column * ~gone[j]
            if self.grid is None:
                return value
            if j % group_size == 0:
                group = slice(j, j + group_size)
                scales.append(scale_of((work[group] * ~gone[group]).T, self.grid.bits, weight.dtype)[:, 0])
            code = round_to_codes(value, scales[-1], self.grid.bits)
            codes[j] = code.to(torch.int8)
            return (code * scales[-1]).to(weight.dtype).float()

        sweep(work, factor, settle, begin=None if self.pattern else choose, panel=panel)
        if self.grid is None:
            return work.T.to(weight.dtype).masked_fill(gone.T, 0)
        scale = torch.stack(scales, 1).to(weight.dtype)
        return Codes(codes.T.contiguous(), scale, self.grid.bits, self.grid.group_size)


def zeros_by_panel(gone: Tensor, zeros: int, panel: int) -> list[int]:
    """Return how many more entries to remove from each `panel` columns so that `zeros` are gone in the end.

    Every panel ends with the same share of zeros; if some start with more, the others lose less.

    Args:
        gone: `[in, out]` bool, the entries that are zero already.
    """
    columns = len(gone)
    stops = [min(start + panel, columns) for start in range(0, columns, panel)]
    existing = [int(part.sum()) for part in gone.split(panel)]
    targets = [zeros * stop // columns for stop in stops]
    missing = [max(b - a - n, 0) for a, b, n in zip([0, *targets], targets, existing, strict=False)]
    wanted = max(zeros - sum(existing), 0)
    sums = [wanted * sum(missing[: i + 1]) // max(sum(missing), 1) for i in range(len(missing))]
    return [b - a for a, b in zip([0, *sums], sums, strict=False)]
