"""Choosing what goes: exact counts, ties to the lower column or flat index; and scores, Wanda's and draws."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import TYPE_CHECKING, TypeAlias

from stages.core.lazy import np, torch
from stages.core.numbers import generator

if TYPE_CHECKING:
    from torch import Tensor


PIECE = 2**18
"""Entries chosen from at a time where rows do not depend on each other: what is computed stays in a cache."""
Scores: TypeAlias = "Callable[[slice], Tensor]"
"""Some rows of a matrix -> their scores, `[those rows, columns]` fp32."""


def drawn(seed: int, name: str, *shape: int) -> Tensor:
    """Scores by lot, `shape` fp32; they depend on the seed and the name of what they score alone."""
    return torch.rand(shape, generator=generator(f"{seed} {name}"))


def wanda_scores(weight: Tensor, norm: Tensor) -> Scores:
    """|w| of `weight` `[out, in]` times the norm `[in]` of its input (Wanda, 2306.11695)."""
    return lambda rows: weight[rows].float().abs() * norm


def whole(parts: dict[str, float], total: int) -> dict[str, int]:
    """`parts`, none negative, as whole numbers that add up to `total`, each within one of its part.

    Largest remainders are rounded up, of those alike the first.

    Args:
        total: less than one away from the sum of all parts.
    """
    made = {name: max(ceil(part) - 1, 0) for name, part in parts.items()}
    order = sorted(parts, key=lambda name: made[name] - parts[name])
    for name in order[: total - sum(made.values())]:
        made[name] += 1
    return made


def smallest(scores: Tensor, count: int | Tensor) -> Tensor:
    """Where the `count` lowest scores of each row of `[rows, columns]` are, bool.

    Args:
        scores: fp32 or fp64, none of them NaN.
        count: of every row, or of each, `[rows]` int64; the marked entries of a row are exactly as many.
    """
    if isinstance(count, torch.Tensor):
        different = count.unique().tolist()
        if len(different) == 1:
            return smallest(scores, different[0])
        made = torch.empty_like(scores, dtype=torch.bool)
        for each in different:
            rows = (count == each).nonzero()[:, 0]
            made[rows] = smallest(scores[rows], each)
        return made
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    # On a CPU numpy's selection takes a fifth of the time of torch's, and a fifteenth of a sort.
    if scores.device.type == "cpu":
        parted = np.partition(scores.detach().numpy(), count - 1, axis=1)
        threshold = torch.from_numpy(parted[:, count - 1 : count].copy())
        apart = (parted[:, count:] > parted[:, count - 1 : count]).all()
        del parted  # as large as the scores
        if apart:  # no ties, as most often
            return scores <= threshold
    else:
        threshold = scores.sort(dim=1).values[:, count - 1 : count]
    below, ties = scores < threshold, scores == threshold
    spare = count - below.sum(1, keepdim=True)
    if (ties.sum(1, keepdim=True) == spare).all():  # the running count below is wide and slow
        return below | ties
    kind = torch.int64 if scores.shape[1] > torch.iinfo(torch.int32).max else torch.int32
    return below | (ties & (ties.cumsum(1, dtype=kind) <= spare.to(kind)))


def smallest_overall(scores: Tensor, count: int) -> Tensor:
    """Where the `count` lowest scores of the whole matrix are, bool `[rows, columns]`."""
    return smallest(scores.reshape(1, -1), count).view_as(scores)


def smallest_in_groups(scores: Tensor, keep: int, size: int) -> Tensor:
    """Where the `size - keep` lowest scores of every `size` columns in a row are, bool `[rows, columns]`."""
    return smallest(scores.reshape(-1, size), size - keep).view_as(scores)


def grown(scores: Tensor, gone: Tensor, count: int) -> Tensor:
    """`gone` and the lowest `scores` `[rows, columns]` beside it, bool, `count` in all or what `gone` has.

    Args:
        gone: bool, what is marked whatever its score.
    """
    scores = scores.masked_fill(gone, -torch.inf)  # the caller's go, if nobody else holds them
    return smallest_overall(scores, max(count, int(gone.sum())))


def grown_by_row(scores: Scores, gone: Tensor, count: int) -> Tensor:
    """The same, levelled: a row has at most one more marked than another unless `gone` had them."""
    have = gone.sum(1)
    each = _levelled(have, max(count, int(have.sum())), gone.shape[1])
    return by_pieces(gone, lambda at: smallest(scores(at).masked_fill(gone[at], -torch.inf), each[at]))


def lowest(scores: Scores, gone: Tensor, count: int, *, by_row: bool) -> Tensor:
    """`gone` and the lowest `scores` beside it, compared within levelled rows or within all."""
    return grown_by_row(scores, gone, count) if by_row else grown(scores(slice(None)), gone, count)


def by_pieces(matrix: Tensor, choose: Callable[[slice], Tensor]) -> Tensor:
    """What `choose` marks in a few rows of `matrix` at a time, put together: bool, shaped as `matrix`."""
    made = torch.empty_like(matrix, dtype=torch.bool)
    rows = max(1, PIECE // matrix.shape[1])
    for start in range(0, len(matrix), rows):
        at = slice(start, start + rows)
        made[at] = choose(at)
    return made


def _levelled(have: Tensor, count: int, columns: int) -> Tensor:
    """How many each row gets to have, `[rows]` int64, at least what it has, `count` in all, evenly."""
    low, high = 0, columns
    while low < high:  # the highest level all rows can be filled up to
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int(have.clamp(min=middle).sum()) <= count else (low, middle - 1)
    filled = have.clamp(min=low)
    more, level = count - int(filled.sum()), (have <= low).nonzero().flatten()
    number = torch.arange(len(level), device=have.device)
    filled[level] += (number + 1) * more // max(len(level), 1) - number * more // max(len(level), 1)
    return filled
