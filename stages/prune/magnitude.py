"""Magnitude pruning: the smallest weights go. Needs no data.

The scope decides the result. `matrix` compares weights within one linear (the baseline of the Wanda and
SparseGPT papers), `row` within one output row.
"""

from typing import Literal

from torch import Tensor

from stages.core.method import WeightMethod
from stages.core.schema import NoData, Sparsity
from stages.prune.exact import zero_smallest


class Magnitude(WeightMethod):
    """Zero the share `sparsity` of weights with the smallest |w|."""

    method: Literal["magnitude"]
    sparsity: Sparsity
    scope: Literal["matrix", "row"]
    calibration: NoData

    def weights(self, weight: Tensor, statistic: None) -> Tensor:
        """Prune `weight` `[out, in]`, any float dtype; the survivors are untouched."""
        scores = weight.float().abs()
        if self.scope == "matrix":
            return zero_smallest(weight.reshape(1, -1), scores.reshape(1, -1), self.sparsity).view_as(weight)
        return zero_smallest(weight, scores, self.sparsity)
