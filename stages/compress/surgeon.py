"""Optimal brain surgery on a weight, column by column: the loop that GPTQ and SparseGPT share.

The columns of W (input features) are settled in order. With U the upper Cholesky factor of the inverse
Hessian, replacing w_j by q_j leaves an error e = (w_j - q_j) / U[j, j], and the later columns compensate for
it by subtracting e U[j, j+1:]: at once within a panel of columns, and for the rest at the end of the panel
(GPTQ 2210.17323, SparseGPT 2301.00774). With H = I nothing is compensated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.numbers import finite

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 128
"""Columns between two updates of all later columns."""


def sweep(
    weight: Tensor,
    factor: Tensor,
    settle: Callable[[int, Tensor], Tensor],
    *,
    begin: Callable[[int, int, Tensor], None] | None = None,
    panel: int = COLUMNS,
) -> None:
    """Settle every column of a weight in place.

    Args:
        weight: `[in, out]` fp32 contiguous, transposed so that a column is a row.
        factor: `[in, in]` fp32, see `stages.compress.statistics.Hessian.inverse_factor`.
        settle: (column number, its updated values `[out]`) -> the values it will have.
        begin: called with (start, stop, weight) before each panel, when its columns are up to date.
        panel: columns between two updates of all later columns, a multiple of the group that `settle` reads.

    Raises:
        Refusal: an error is NaN or infinite, which the settled values may not show.
    """
    columns, diagonal = len(weight), factor.diagonal().tolist()
    for start in range(0, columns, panel):
        stop = min(start + panel, columns)
        if begin:
            begin(start, stop, weight)
        errors = torch.empty_like(weight[start:stop])
        for j in range(start, stop):
            value = settle(j, weight[j])
            error = torch.sub(weight[j], value, out=errors[j - start]).div_(diagonal[j])
            weight[j] = value
            weight[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
        if not finite(errors):
            raise Refusal(
                "the error its columns compensate for overflows fp32; nothing was written. Look for huge "
                "weights or raise damping."
            )
        weight[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
