"""Certificates for GPTQ and SparseGPT: their sweep is replayed in fp64 along the choices that they made.

Two correct sweeps in fp32 need not agree. A weight half-way between two codes, or two scores that differ by
rounding alone, can go either way with the order in which a kernel sums, and every later column follows.
Under a symmetric scale the largest weight of a group, where it is negative, always lies half-way. So no two
results are compared. Each column is set to the value that the method gave it, and every choice is judged by
the weights that fp64 has at that point: it must be right, or wrong by no more than the rounding of fp32.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.compress.statistics import Hessian
from stages.compress.surgeon import COLUMNS
from stages.model import grid
from stages.model.grid import Codes, bounds, scale_of

WEIGHT = 4e-6
"""Error of an fp32 weight when its column is settled, as a share of the largest weight of its row."""
SCORE = 1e-5
"""Relative error of a score when it is compared with others."""
MISTAKES = ("scale", "compensation", "damping")
"""What `let_err` gets wrong by little: a certificate that lets these pass is worth nothing."""


def certify_gptq(
    codes: Codes,
    weight: Tensor,
    statistic: Hessian,
    damping: float,
    *,
    act_order: bool = False,
    static_groups: bool = False,
) -> None:
    """Check every scale, zero point and code that GPTQ chose for an fp32 `weight` `[out, in]`.

    Raises:
        AssertionError: one of them is wrong.
    """
    columns, (low, high) = weight.shape[1], bounds(codes.bits)
    size, keep = codes.group_size or columns, weight != 0
    diagonal = statistic.matrix().diagonal().tolist()
    order = sorted(range(columns), key=lambda j: (-diagonal[j], j)) if act_order else list(range(columns))
    inverses = first_rows(damped(statistic, damping), order)
    error = WEIGHT * weight.abs().amax(1).double()
    for j, work in replay(weight, inverses, codes.dequantize(), order):
        scale = codes.scale[:, j // size].double()
        zero = 0 * scale if codes.zero_point is None else codes.zero_point[:, j // size].double()
        if j % size == 0:
            group = ((weight if static_groups or act_order else work) * keep)[:, j : j + size].double()
            check_scale(scale, group, codes.bits, error, symmetric=codes.zero_point is None)
            if codes.zero_point is not None:
                exact = (low - group.amin(1).clamp(max=0) / scale).clamp(low, high)
                assert ((exact - zero).abs() <= 0.5 + error / scale).all(), f"zero points at column {j}"
        exact = (work[:, j] / scale + zero).clamp(low, high)
        right = (exact - codes.codes[:, j]).abs() <= 0.5 + error / scale
        assert torch.where(keep[:, j], right, codes.codes[:, j] == zero).all(), f"codes of column {j}"


def certify_sparsegpt(
    result: Tensor | Codes,
    weight: Tensor,
    statistic: Hessian,
    damping: float,
    *,
    zeros: int = 0,
    pattern: tuple[int, int] | None = None,
) -> None:
    """Check every zero, value, scale and code that SparseGPT chose for an fp32 `weight` `[out, in]`.

    The weights to go are chosen every 128 columns, or every M columns under N:M, by the weights at that
    point and the inverses that each column will meet. A score within rounding of the cut may go or stay; the
    counts are exact. Of dead features the smallest weights go before anything else.

    Args:
        zeros: how many weights are to be gone in the end; not with a pattern.

    Raises:
        AssertionError: one of them is wrong.
    """
    columns, by_row = weight.shape[1], pattern is not None
    codes = result if isinstance(result, Codes) else None
    values = codes.dequantize() if codes else result
    size, run = (codes and codes.group_size) or columns, pattern[1] if pattern else COLUMNS
    gone, zero, dead = weight == 0, values == 0, statistic.dead().expand_as(weight)
    if not pattern:
        spare = max(min(zeros, int((gone | dead).sum())) - int(gone.sum()), 0)
        ascending = weight.abs().masked_fill(gone | ~dead, torch.inf).flatten().argsort(stable=True)
        gone.view(-1)[ascending[:spare]] = True
    inverses = first_rows(damped(statistic, damping), range(columns))
    roots = torch.stack([inverse[0] for inverse in inverses]).sqrt()
    error = WEIGHT * weight.abs().amax(1).double()
    must, may, right = gone.clone(), gone.clone(), torch.zeros_like(gone)
    totals = []
    for j, work in replay(weight, inverses, values, range(columns)):
        if j % run == 0:
            here = slice(j, min(j + run, columns))
            scores, had = work[:, here].abs() / roots[here], gone[:, here].clone()
            count = zeros * here.stop // columns - zeros * j // columns
            if pattern:
                scores = torch.where(dead[:, here], -1 / (1 + work[:, here].abs()), scores)
                count = pattern[1] - pattern[0]
            low, high = cut(scores.masked_fill(had, -torch.inf), count, by_row)
            must[:, here] |= scores < low
            may[:, here] |= scores <= high
            gone[:, here] = must[:, here] | (may & zero)[:, here]
            totals.append((here, number(had, by_row).clamp(min=count)))
        if codes is None:
            right[:, j] = (work[:, j] - values[:, j]).abs() <= error
            continue
        scale = codes.scale[:, j // size].double()
        if j % size == 0:
            check_scale(scale, (work * ~gone)[:, j : j + size], codes.bits, error)
        exact = (work[:, j] / scale).clamp(*bounds(codes.bits))
        right[:, j] = (exact - codes.codes[:, j]).abs() <= 0.5 + error / scale
    assert zero[must].all(), "weights whose score is under the cut have stayed"
    assert right[~may].all() and (right | zero).all(), "weights that stay are not what they should be"
    for here, total in totals:
        least, most = must | (may & ~right), must | (may & zero)
        assert (number(least[:, here], by_row) <= total).all(), f"more have gone than are to go: {here}"
        assert (number(most[:, here], by_row) >= total).all(), f"fewer have gone than are to go: {here}"


def damped(statistic: Hessian, damping: float) -> Tensor:
    """Return H + damping * mean(diag H) * I in fp64, the diagonal of dead features set to 1."""
    hessian = statistic.matrix().double()
    hessian.diagonal()[statistic.dead()] = 1
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian)).to(hessian)


def first_rows(hessian: Tensor, order: Sequence[int]) -> list[Tensor]:
    """Return the first row of the inverse of what is left of `hessian` at each step, fp64.

    An inverse A without its first feature is A[1:, 1:] - A[1:, 0] A[0, 1:] / A[0, 0].
    """
    left, rows = torch.linalg.inv(hessian[order][:, order]), []
    for _ in order:
        rows.append(left[0])
        left = left[1:, 1:] - left[1:, :1] * left[:1, 1:] / left[0, 0]
    return rows


def replay(
    weight: Tensor, inverses: Sequence[Tensor], values: Tensor, order: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Yield before each column is settled its number and the weights `[out, in]` as fp64 has them then.

    Settling w at q moves the columns still to come by -(w - q) / inverse[0] * inverse.

    Args:
        inverses: `first_rows` in this order.
        values: `[out, in]`, where the method settled each column.
    """
    work = weight.double().clone()
    for step, j in enumerate(order):
        yield j, work
        error = (work[:, j] - values[:, j]) / inverses[step][0]
        work[:, order[step:]] -= error[:, None] * inverses[step]
        work[:, j] = values[:, j].double()


def check_scale(scale: Tensor, group: Tensor, bits: int, error: Tensor, *, symmetric: bool = True) -> None:
    """Check the scales `[out]` of a group `[out, columns]` of weights known up to `error` `[out]`.

    Raises:
        AssertionError: one does not fit the span of its weights, or is not 1 where they are all zero.
    """
    span = group.amax(1).clamp(min=0) - group.amin(1).clamp(max=0)
    if symmetric:
        span = 2 * group.abs().amax(1)
    fits = (scale * (2**bits - 1) - span).abs() <= 2 * error
    assert torch.where(span > 0, fits, scale == 1).all(), "scales do not fit their groups"


def cut(scores: Tensor, count: int, by_row: bool) -> tuple[Tensor, Tensor]:
    """Return below which score all, and above which none, are of the `count` lowest: `[rows or 1, 1]`."""
    ascending = (scores if by_row else scores.reshape(1, -1)).sort(1).values
    ends = torch.nn.functional.pad(ascending, (1, 1), value=torch.inf)
    ends[:, 0] = -torch.inf
    middle = ends[:, count : count + 2].mean(1, keepdim=True)
    return middle - SCORE * middle.abs(), middle + SCORE * middle.abs()


def number(marked: Tensor, by_row: bool) -> Tensor:
    """Count the marked entries of each row, or of all: `[rows or 1]`."""
    return marked.sum(1) if by_row else marked.sum()[None]


def let_err(mistake: str, patch: pytest.MonkeyPatch) -> None:
    """Make scales 1.0001 times as large, the compensation 0.99 times, or the damping 1.01 times."""
    factor = Hessian.inverse_factor

    def wrong_factor(statistic: Hessian, damping: float, **options: Any) -> Tensor:
        upper = factor(statistic, 1.01 * damping if mistake == "damping" else damping, **options)
        return 0.99 * upper + 0.01 * upper.diagonal().diag() if mistake == "compensation" else upper

    patch.setattr(Hessian, "inverse_factor", wrong_factor)
    if mistake == "scale":
        patch.setattr(grid, "scale_of", lambda *group: 1.0001 * scale_of(*group))
