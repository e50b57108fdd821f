"""Selecting the weights to remove: exact counts, ties to the lower column or flat index; and two scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from stages.core.lazy import np, torch
from stages.core.numbers import generator

if TYPE_CHECKING:
    from torch import Tensor


_PIECE, _CARD_PIECE = 2**18, 2**26
"""Entries processed at a time where rows are independent, on a CPU, to stay in its cache, and on
other devices."""
Scores: TypeAlias = "Callable[[slice], Tensor]"
"""Some rows of a matrix -> their scores, `[rows, columns]` fp32."""


def random_scores(seed: int, name: str, *shape: int) -> Tensor:
    """Draw scores, `shape` fp32, that depend only on the seed and the name of what they score."""
    return torch.rand(shape, generator=generator(f"{seed} {name}"))


def wanda_scores(weight: Tensor, norm: Tensor) -> Scores:
    """Score `weight` `[out, in]` by |w| times the norm `[in]` of its input (Wanda, 2306.11695)."""
    return lambda rows: weight[rows].float().abs() * norm


def smallest(scores: Tensor, count: int | Tensor) -> Tensor:
    """Mark the `count` lowest scores of each row of `[rows, columns]`, bool.

    Args:
        scores: fp32 or fp64, none of them NaN.
        count: for every row, or for each, `[rows]` int64. Exactly so many entries are marked.
    """
    if isinstance(count, torch.Tensor):
        different = count.unique().tolist()
        if len(different) == 1:
            return smallest(scores, different[0])
        mask = torch.empty_like(scores, dtype=torch.bool)
        for each in different:
            rows = (count == each).nonzero()[:, 0].to(scores.device)
            mask[rows] = smallest(scores[rows], each)
        return mask
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    # On a CPU numpy's selection takes a fifth of the time of torch's, and a fifteenth of a sort.
    if scores.device.type == "cpu":
        parted = np.partition(scores.detach().numpy(), count - 1, axis=1)
        threshold = torch.from_numpy(parted[:, count - 1 : count].copy())
        distinct = (parted[:, count:] > parted[:, count - 1 : count]).all()
        del parted  # as large as the scores
        if distinct:  # usually there are no ties
            return scores <= threshold
    else:
        threshold = _threshold(scores, count)
    below, ties = scores < threshold, scores == threshold
    spare = count - below.sum(1, keepdim=True)
    # The running count below is wide and slow on a CPU; a card would wait for this test.
    if scores.device.type == "cpu" and (ties.sum(1, keepdim=True) == spare).all():
        return below | ties
    dtype = torch.int64 if scores.shape[1] > torch.iinfo(torch.int32).max else torch.int32
    return below | (ties & (ties.cumsum(1, dtype=dtype) <= spare.to(dtype)))


def _threshold(scores: Tensor, count: int) -> Tensor:
    """Return the `count`-th lowest score of each row of `[rows, columns]`, `[rows, 1]`; made for a card.

    Which of several equal scores are among the lowest may differ between runs; the largest value may not.
    """
    return scores.topk(count, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)


def smallest_overall(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` lowest scores of the whole matrix, bool `[rows, columns]`."""
    return smallest(scores.reshape(1, -1), count).view_as(scores)


def smallest_in_groups(scores: Tensor, keep: int, size: int) -> Tensor:
    """Mark the `size - keep` lowest scores of every `size` consecutive columns, bool `[rows, columns]`."""
    return smallest(scores.reshape(-1, size), size - keep).view_as(scores)


def extend_mask(scores: Scores, gone: Tensor, count: int, *, by_row: bool) -> Tensor:
    """Mark `gone` and the lowest `scores` outside it, compared over the matrix or within levelled rows.

    See `extend_overall` and `extend_by_row`.
    """
    return extend_by_row(scores, gone, count) if by_row else extend_overall(scores(slice(None)), gone, count)


def extend_overall(scores: Tensor, gone: Tensor, count: int) -> Tensor:
    """Mark `gone` and the lowest `scores` `[rows, columns]` outside it, bool.

    Args:
        gone: bool, marked whatever its scores.
        count: marks in all; if `gone` has more, only `gone` is marked.
    """
    scores = scores.masked_fill(gone, -torch.inf)  # frees the caller's scores if nothing else holds them
    return smallest_overall(scores, max(count, int(gone.sum())))


def extend_by_row(scores: Scores, gone: Tensor, count: int) -> Tensor:
    """Mark `gone` and the lowest `scores` of each row outside it, bool; see `extend_overall`.

    Rows are levelled: their numbers of marks differ by at most one, except where `gone` has more.
    """
    present = gone.sum(1).cpu()  # a number a row: a card would wait at each step of the search
    each = _level(present, max(count, int(present.sum())), gone.shape[1])
    return by_pieces(
        gone, lambda rows: smallest(scores(rows).masked_fill(gone[rows], -torch.inf), each[rows])
    )


def by_pieces(matrix: Tensor, choose: Callable[[slice], Tensor]) -> Tensor:
    """Apply `choose` to a few rows of `matrix` at a time and join its masks: bool, shaped as `matrix`."""
    mask = torch.empty_like(matrix, dtype=torch.bool)
    entries = _PIECE if matrix.device.type == "cpu" else _CARD_PIECE
    step = max(1, entries // matrix.shape[1])
    for start in range(0, len(matrix), step):
        rows = slice(start, start + step)
        mask[rows] = choose(rows)
    return mask


def _level(present: Tensor, count: int, columns: int) -> Tensor:
    """Spread `count` marks evenly over rows, each with at least what it has, `present`: `[rows]` int64."""
    low, high = 0, columns
    while low < high:  # find the highest level that all rows can be filled up to
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int(present.clamp(min=middle).sum()) <= count else (low, middle - 1)
    filled = present.clamp(min=low)
    more, level = count - int(filled.sum()), (present <= low).nonzero().flatten()
    number = torch.arange(len(level))
    filled[level] += (number + 1) * more // max(len(level), 1) - number * more // max(len(level), 1)
    return filled
