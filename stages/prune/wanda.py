"""Wanda (2306.11695): a weight matters as much as it is large and its input is loud.

The score of W[i, j] is |W[i, j]| * sqrt(mean over tokens of X[t, j] squared); in each output row the
lowest-scoring share is zeroed. No weight is updated, so it costs one forward pass. With inputs of equal
norm it is row-wise magnitude.
"""

from typing import Literal

from torch import Tensor

from stages.core.calibration import Calibration
from stages.core.method import WeightMethod
from stages.core.schema import Sparsity
from stages.core.statistics import ColumnNorm
from stages.prune.exact import zero_smallest


class Wanda(WeightMethod):
    """Zero the share `sparsity` of each output row with the smallest |w| * norm of its input."""

    method: Literal["wanda"]
    sparsity: Sparsity
    calibration: Calibration

    statistic = ColumnNorm

    def weights(self, weight: Tensor, statistic: ColumnNorm) -> Tensor:
        """Prune `weight` `[out, in]`, any float dtype, by the norms of its inputs; survivors stay."""
        return zero_smallest(weight, weight.float().abs() * statistic.norm(), self.sparsity)
