"""Optimal brain surgery on a weight, column by column: the loop GPTQ and SparseGPT share.

Columns of W (input features) are settled in order. With U the upper Cholesky factor of the inverse
Hessian, settling column j at q_j instead of w_j leaves an error e = (w_j - q_j) / U[j, j], and the columns
still to come make up for it by losing e U[j, j+1:]: at once inside a run of columns, for the rest when the
run is done (GPTQ 2210.17323, SparseGPT 2301.00774). With H = I nothing is passed on.
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
"""Columns in a run of eager updates."""


def sweep(
    weight: Tensor,
    factor: Tensor,
    settle: Callable[[int, Tensor], Tensor],
    *,
    begin: Callable[[int, int, Tensor], None] | None = None,
    run: int = COLUMNS,
) -> None:
    """Settle every column of `weight` `[in, out]` fp32 contiguous, transposed so that a column is a row.

    Args:
        factor: `[in, in]` fp32, see `stages.compress.statistics.Hessian.inverse_factor`.
        settle: (column number, its updated values `[out]`) -> the values it will have.
        begin: called with (start, stop, weight) before the columns of a run, their values up to date.
        run: columns between two updates of the rest, a multiple of those that `settle` looks at together.

    Raises:
        Refusal: errors are no numbers any more, which `settle` may hide.
    """
    columns, diagonal = len(weight), factor.diagonal().tolist()
    for start in range(0, columns, run):
        stop = min(start + run, columns)
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
                "what its columns make up for grows past fp32; nothing was written. Look for huge weights or "
                "raise damping."
            )
        weight[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
