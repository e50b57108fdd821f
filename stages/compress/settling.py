"""The kernel that settles a block of columns on a GPU, for `stages.compress.surgeon`.

A program owns some rows of the weight and holds their part of the block in registers. It settles column after
column: picks the column, masks and rounds it, and subtracts its error from the later columns. Rows do not
touch each other, so programs share nothing. All arithmetic is fp32 as in the loop that it replaces, division
and rounding exact; sums may be contracted or ordered otherwise, so last bits differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from stages.core.lazy import torch
from stages.model.grid import bounds

if TYPE_CHECKING:
    from torch import Tensor

    from stages.compress.rounding import Rounding

ROWS = 32
"""Rows of the weight a program owns; with 8, 16 or 64 a launch took as long or longer on an H100."""
_STORED = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def settle(
    work: Tensor,
    moves: Tensor,
    gone: Tensor,
    rounding: Rounding | None,
    errors: Tensor,
    block: slice,
    *,
    rows: int = ROWS,
) -> None:
    """Settle a block of columns of `work` that are up to date.

    Args:
        work: `[in, out]` fp32, in place.
        moves: U[j, k] / U[j, j], `[in, in]` fp32.
        gone: `[in, out]` bool.
        errors: `[columns of the block, out]` fp32 contiguous, to be filled.
        rows: a power of 2.
    """
    count, out = errors.shape
    zero = rounding.zero if rounding else None
    low, high = bounds(rounding.grid.bits) if rounding else (0, 0)
    kernel: Any = _settle
    kernel[(triton.cdiv(out, rows),)](
        work[block],
        moves[block, block],
        gone[block].view(torch.uint8),
        errors,
        rounding.codes[block] if rounding else work,
        rounding.groups[block] if rounding else work,
        rounding.scale if rounding else work,
        work if zero is None else zero,
        count,
        len(work),
        out,
        low,
        high,
        rounds=rounding is not None,
        shifts=zero is not None,
        stored=_STORED[rounding.dtype] if rounding else tl.float32,
        width=triton.next_power_of_2(count),
        rows=rows,
    )


@triton.jit
def rounded(value, stored: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round fp32 values to nearest, ties to even, in another dtype."""
    if stored == tl.bfloat16:  # in whole numbers, as Triton's interpreter would cut bits off
        bits = value.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return value.to(stored).to(tl.float32)


@triton.jit
def _settle(  # type: ignore[no-untyped-def]
    work,
    moves,
    gone,
    errors,
    codes,
    groups,
    scales,
    zeros,
    count,
    columns,
    out,
    low,
    high,
    rounds: tl.constexpr,
    shifts: tl.constexpr,
    stored: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
):
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.arange(0, width)
    inside = row < out
    spots = column[:, None] * out + row[None, :]
    here = (column < count)[:, None] & inside[None, :]
    tile = tl.load(work + spots, mask=here, other=0.0)
    for j in range(count):
        chosen = (column == j)[:, None]
        value = tl.sum(tl.where(chosen, tile, 0.0), axis=0)
        leaves = tl.load(gone + j * out + row, mask=inside, other=1) != 0
        kept = tl.where(leaves, 0.0, value)
        if rounds:
            group = tl.load(groups + j) * out + row
            scale = tl.load(scales + group, mask=inside, other=1.0)
            zero = tl.zeros_like(scale)
            if shifts:
                zero = tl.load(zeros + group, mask=inside, other=0.0)
            # Bounds are whole, so clamping before rounding gives the same; adding and subtracting 1.5 * 2^23
            # rounds small numbers, ties to even.
            code = tl.minimum(tl.maximum(tl.div_rn(kept, scale), low - zero), high - zero)
            code = (code + 12582912.0) - 12582912.0
            kept = rounded(code * scale, stored)
            tl.store(codes + j * out + row, (code + zero).to(tl.int8), mask=inside)
        error = value - kept
        tl.store(errors + j * out + row, error, mask=inside)
        move = tl.load(moves + j * columns + column, mask=column < count, other=0.0)
        later = tl.where((column > j)[:, None], tile - move[:, None] * error[None, :], tile)
        tile = tl.where(chosen, kept[None, :], later)
    tl.store(work + spots, tile, mask=here)
