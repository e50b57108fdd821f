"""Zeroing an exact count of entries a row, ties included."""

from math import floor

from torch import Tensor


def zero_smallest(weight: Tensor, scores: Tensor, sparsity: float) -> Tensor:
    """Zero the floor(columns * sparsity) lowest-scoring entries of each row of `weight` `[rows, columns]`.

    Ties fall to the lower column, so the count is exact and the choice does not depend on the machine.
    Sparsity 0 changes nothing.
    """
    # The tiny term keeps 10 * 0.3 = 2.9999... from losing an entry.
    count = floor(weight.shape[1] * sparsity + 1e-9)
    if not count:
        return weight.clone()
    # A full sort, as kthvalue has no deterministic form on CUDA.
    threshold = scores.sort(dim=1).values[:, count - 1 : count]
    below, ties = scores < threshold, scores == threshold
    spare = count - below.sum(1, keepdim=True)
    return weight.masked_fill(below | (ties & (ties.cumsum(1) <= spare)), 0)
