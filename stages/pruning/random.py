"""Random pruning, the control: the cost of removing any weights at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.compress.select import random_scores
from stages.core.schema import Seed
from stages.corpus.windows import OptionalTokens
from stages.pruning.pruner import Pruner

if TYPE_CHECKING:
    from torch import Tensor

    from stages.model.blocks import Linear


class Random(Pruner):
    """Zero the share `sparsity` of weights, drawn evenly within each matrix."""

    method: Literal["random"]
    seed: Seed
    calibration: OptionalTokens
    """Text for an allocation that is measured on text."""

    def replace(self, linear: Linear, statistic: None, plan: dict[str, int]) -> Tensor:
        """Prune a linear; the draw depends on the seed and the linear's name, not on the order of linears."""
        weight = linear.weight
        scores = random_scores(self.seed, linear.name, *weight.shape).to(weight.device)
        return self.pruned(weight, scores.__getitem__, plan[linear.name])
