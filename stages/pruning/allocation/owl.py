"""OWL (outlier-weighed, 2310.05175): blocks with many outliers lose less.

An entry of a weight is an outlier if its Wanda score, |w| times the norm of its input, is more than
`multiple` times the mean score of its block. The score of a block is its share of outliers. Scores are scaled
to [0, 2 * spread], and a block keeps that much more or less around a mean kept share of 1 - sparsity.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from math import nan
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from stages.compress.select import wanda_scores
from stages.compress.statistics import ColumnNorm, Statistic
from stages.compress.walk import walk
from stages.core.lazy import torch
from stages.model.blocks import Linear, linears
from stages.pruning.allocation.shares import BlockAllocation

if TYPE_CHECKING:
    from torch import Tensor

    from stages.model.source import Empty


class OWL(BlockAllocation):
    """Take less of blocks with many outliers among |w| * norm of its input."""

    reads_text: ClassVar[bool] = True
    remedy: ClassVar[str] = "a smaller spread"
    kind: Literal["owl"]
    multiple: Annotated[float, Field(gt=0)] = 5.0
    """How many times the mean score an outlier has."""
    spread: Annotated[float, Field(gt=0, lt=0.5)] = 0.08
    """The paper's lambda: the shares of two blocks differ by at most twice this."""

    @property
    def span(self) -> tuple[float, float]:
        """From 0 down to -2 * spread."""
        return 0.0, -2 * self.spread

    def share(self, level: float, number: float) -> float:
        """Return the level, shifted."""
        return level + number

    def scores(
        self, source: Empty, ignore: tuple[str, ...], windows: Tensor | None, batch_size: int | None
    ) -> dict[str, float]:
        """Return the share of outliers in each block, from one forward through the dense model."""
        waiting = Counter(linear.block for linear in linears(source.model, ignore))
        collected: dict[str, list[Tensor]] = defaultdict(list)
        shares: dict[str, float] = {}

        def look(linear: Linear, norms: Statistic | None) -> None:
            assert isinstance(norms, ColumnNorm)
            entries = collected[linear.block]
            entries.append(wanda_scores(linear.weight, norms.norm())(slice(None)).flatten())
            if len(entries) == waiting[linear.block]:
                shares[linear.block] = outlier_share(torch.cat(collected.pop(linear.block)), self.multiple)

        source.bring_rest()
        walk(
            source.model, look, windows=windows, statistic=ColumnNorm, sequential="none", ignore=ignore,
            batch_size=batch_size, label="owl", home=source,
        )  # fmt: skip
        return shares


def outlier_share(scores: Tensor, multiple: float) -> float:
    """Return the share of `scores` `[n]` above `multiple` times their mean; NaN if the mean is not finite."""
    mean = scores.mean()
    return int((scores > multiple * mean).count_nonzero()) / scores.numel() if mean.isfinite() else nan
