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
    lowest = scores.argsort(dim=1, stable=True)[:, :count]
    return weight.scatter(1, lowest, 0)
