"""Wanda (2306.11695): a weight matters more the larger it is and the larger its input.

The score of W[i, j] is |W[i, j]| * sqrt(mean over tokens of X[t, j] squared); in each output row the
lowest-scoring share is zeroed. No weight is updated, so it costs one forward pass. With inputs of equal
norm it is row-wise magnitude pruning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.compress.select import wanda_scores
from stages.compress.statistics import ColumnNorm
from stages.corpus.windows import Calibration
from stages.pruning.pruner import Pruner

if TYPE_CHECKING:
    from torch import Tensor


class Wanda(Pruner):
    """Zero the share `sparsity` of each output row with the smallest |w| * norm of its input."""

    method: Literal["wanda"]
    calibration: Calibration

    statistic = ColumnNorm
    on_dead = "the first of their row to go"

    @property
    def by_row(self) -> bool:
        """Always true: the paper compares within rows."""
        return True

    def weights(self, weight: Tensor, statistic: ColumnNorm, zeros: int) -> Tensor:
        """Prune `weight` `[out, in]`, any float dtype, by its input norms; survivors keep their values."""
        return self.pruned(weight, wanda_scores(weight, statistic.norm()), zeros)
