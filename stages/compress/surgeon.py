"""Optimal brain surgery on a weight, column by column: the loop that GPTQ and SparseGPT share.

The columns of W (input features) are settled in order: at zero where they are to go, else at their own value
or the nearest point of a grid. With U the upper Cholesky factor of the inverse Hessian, settling w_j at q_j
leaves an error e = w_j - q_j, and the later columns compensate for it by subtracting e U[j, j+1:] / U[j, j]
(GPTQ 2210.17323, SparseGPT 2301.00774). With H = I nothing is compensated.

Columns wait for their updates, so that most of the work is products of matrices. A block of columns is
settled by a loop, or on a GPU by one kernel; then the rest of its panel is updated, and at the end of the
panel all later columns. A decision about several columns, such as the scale of a group, is made when the
first of them is reached. Rows do not touch each other, so weights with one Hessian are swept side by side.
"""

from __future__ import annotations

import logging
from functools import cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from stages.compress.rounding import Rounding
from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.memory import exhausted
from stages.core.numbers import finite
from stages.model.grid import bounds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

log = logging.getLogger(__name__)

COLUMNS = 128
"""Columns between two updates of all later columns."""
BLOCK = 32
"""Columns that the loop settles between two updates of their panel."""


def sweep(
    work: Tensor,
    factor: Tensor,
    gone: Tensor,
    rounding: Rounding | None = None,
    *,
    begin: Callable[[int], None] | None = None,
    unit: int = COLUMNS,
    panel: int = COLUMNS,
) -> Tensor:
    """Settle every column of a weight in place.

    Args:
        work: `[in, out]` fp32 contiguous, the weight transposed so that a column is a row.
        factor: `[in, in]` fp32, see `stages.compress.statistics.Hessian.inverse_factor`.
        gone: `[in, out]` bool, the entries to settle at zero.
        rounding: the grid of the other entries, which gets their codes; None leaves them as they are.
        begin: called with the number of every `unit`-th column when it and the later columns of its panel are
            up to date. It may extend `gone` and fit `rounding` for columns from this one on.
        unit: columns between two calls of `begin`; divides `panel`.
        panel: columns between two updates of all later columns.

    Returns:
        The largest error of each row of the weight, `[out]` fp32, for `check_errors`.
    """
    columns = len(work)
    moves = factor / factor.diagonal()[:, None]
    settle, width = (_settle_fused, COLUMNS) if fused(work) else (_settle, BLOCK)
    worst = work.new_zeros(work.shape[1])
    for start in range(0, columns, panel):
        stop = min(start + panel, columns)
        errors = torch.empty_like(work[start:stop])
        for first in range(start, stop, unit):
            if begin:
                begin(first)
            for at in range(first, end := min(first + unit, stop), width):
                block = slice(at, min(at + width, end))
                done = errors[block.start - start : block.stop - start]
                settle(work, moves, gone, rounding, done, block)
                if block.stop < stop:
                    rest = slice(block.stop, stop)
                    work[rest].addmm_(moves[block, rest].T, done, alpha=-1)
        if stop < columns:
            work[stop:].addmm_(moves[start:stop, stop:].T, errors, alpha=-1)
        torch.maximum(worst, errors.abs_().amax(0), out=worst)
    return worst


def side_by_side(weights: Sequence[Tensor]) -> tuple[Tensor, list[slice]]:
    """Return weights `[out, in]` of any float dtype as one matrix to sweep, and the place of each.

    Returns:
        `[in, sum of out]` fp32 contiguous, and each weight's part of its second dimension.
    """
    ends = accumulate((len(weight) for weight in weights), initial=0)
    work = torch.cat([weight.float().T for weight in weights], 1)
    return work.contiguous(), [slice(*ends) for ends in pairwise(ends)]


def check_errors(worst: Tensor) -> None:
    """Refuse errors of a sweep that are NaN or infinite, which the settled values may not show.

    Raises:
        Refusal: an entry of `worst`, see `sweep`, is NaN or infinite.
    """
    if not finite(worst):
        raise Refusal(
            "the error its columns compensate for overflows fp32; nothing was written. Look for huge "
            "weights or raise damping."
        )


def fused(work: Tensor) -> bool:
    """Tell whether a kernel settles the columns of `work`: on a GPU where Triton can compile it."""
    return work.is_cuda and compiles(work.device)


@cache
def compiles(device: torch.device) -> bool:
    """Try the kernel on a small matrix, and log why the loop takes its place if it cannot be compiled."""
    try:
        small = torch.eye(16, device=device)
        _settle_fused(small, small, small > 0, None, torch.empty_like(small), slice(0, 16))
    except Exception as error:
        if exhausted(error) or "out of memory" in str(error) or "CUDA error" in str(error):
            raise
        log.warning(
            "%s: Triton cannot compile a kernel, so SparseGPT and GPTQ use a slower loop (%s: %s). It needs "
            "gcc, the headers of C and Python, and a folder to write to (TRITON_CACHE_DIR).",
            device, type(error).__name__, error,
        )  # fmt: skip
        return False
    return True


def _settle_fused(
    work: Tensor, moves: Tensor, gone: Tensor, rounding: Rounding | None, errors: Tensor, block: slice
) -> None:
    """Do what `_settle` does in one launch."""
    from stages.compress.settling import settle

    settle(work, moves, gone, rounding, errors, block)


def _settle(
    work: Tensor, moves: Tensor, gone: Tensor, rounding: Rounding | None, errors: Tensor, block: slice
) -> None:
    """Settle a block of columns that are up to date, each after an update by those before it.

    Args:
        moves: U[j, k] / U[j, j], `[in, in]` fp32.
        errors: `[columns of the block, out]` fp32, to be filled.
    """
    here = work[block]
    multiply, subtract = torch.mul, torch.sub
    # Errors that are still zero let every column take the product with all of them.
    pulls = moves[block, block].triu(1).neg_().T.contiguous()
    past = errors.zero_().T
    if rounding is None:
        leaves = gone[block].float()
        for column, pull, leave, error in zip(here, pulls, leaves, errors, strict=True):
            multiply(column.addmv_(past, pull), leave, out=error)
        here.sub_(errors)
        return
    low, high = bounds(rounding.grid.bits)
    groups = rounding.groups[block]
    scales = rounding.scale[groups]
    zeros = None if rounding.zero is None else rounding.zero[groups]
    keeps, codes, values = (~gone[block]).float(), torch.empty_like(here), torch.empty_like(here)
    stored = None if rounding.dtype == torch.float32 else torch.empty_like(here[0], dtype=rounding.dtype)
    rows = zip(here, pulls, keeps, scales, codes, values, errors, strict=True)
    for j, (column, pull, keep, scale, code, value, error) in enumerate(rows):
        multiply(column.addmv_(past, pull), keep, out=code).div_(scale).round_()
        if zeros is None:
            multiply(code.clamp_(low, high), scale, out=value)
        else:
            subtract(code.add_(zeros[j]).clamp_(low, high), zeros[j], out=value).mul_(scale)
        if stored is not None:
            value.copy_(stored.copy_(value))
        subtract(column, value, out=error)
    rounding.codes[block] = codes.to(torch.int8)
    here.copy_(values)
