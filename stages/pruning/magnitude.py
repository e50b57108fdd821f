"""Magnitude pruning: the smallest weights are zeroed. Needs no data.

The result depends on `scope`. `global` has one threshold for all pruned matrices (Junk DNA, 2310.02277),
`matrix` compares weights within one linear (the baseline of the Wanda and SparseGPT papers), `row` within one
output row. Under `global` ties at the threshold go to the first linear. With `structure: N:M` weights are
compared within their M only, so `matrix` and `row` are the same and `global` is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from stages.core.lazy import torch
from stages.core.numbers import count_of
from stages.corpus.windows import OptionalTokens
from stages.model.blocks import blocks, linears
from stages.pruning.pruner import Pruner

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from stages.model.source import Empty

BINS = 2**16


class Magnitude(Pruner):
    """Zero the share `sparsity` of weights with the smallest |w|."""

    method: Literal["magnitude"]
    scope: Literal["global", "matrix", "row"]
    calibration: OptionalTokens
    """Text for an allocation that is measured on text."""

    @model_validator(mode="after")
    def _one_threshold(self) -> Self:
        if self.scope == "global" and (self.pattern or not self.allocation.even):
            raise ValueError("scope global is an allocation of its own; leave structure and allocation out")
        return self

    @property
    def by_row(self) -> bool:
        """Whether `scope` is `row`."""
        return self.scope == "row"

    def plan(self, source: Empty, windows: Callable[[], Tensor]) -> dict[str, int]:
        """Return the number of zeros of each linear; under `global`, its weights below the threshold."""
        if self.scope == "global":
            return global_zeros(source, self.ignore, self.sparsity)
        return super().plan(source, windows)

    def weights(self, weight: Tensor, statistic: None, zeros: int) -> Tensor:
        """Prune `weight` `[out, in]`, any float dtype; survivors keep their values."""
        return self.pruned(weight, lambda rows: weight[rows].float().abs(), zeros)


def global_zeros(source: Empty, ignore: tuple[str, ...], sparsity: float) -> dict[str, int]:
    """Count the weights of each linear that are among the share `sparsity` of smallest |w| in all linears.

    One block is in memory at a time and nothing is sorted: |w| in 16 bits has 2^15 values, which are counted,
    and the weights equal to the threshold are given to linears in order. In fp32 the upper 16 bits are
    counted first, then the lower 16 bits of the weights whose upper bits are the threshold's.
    """
    targets = linears(source.model, ignore)
    wanted = count_of(sparsity, sum(linear.weight.numel() for linear in targets))
    zeros = dict.fromkeys((linear.name for linear in targets), 0)
    upper: int | None = None
    counts: dict[str, Tensor] = {}
    for _ in range(targets[0].weight.element_size() // 2):
        for name, block in blocks(source.model):
            with source.block(name, block):
                for linear in (linear for linear in targets if linear.block == name):
                    counts[linear.name] = torch.bincount(_bins(linear.weight, upper), minlength=BINS).cpu()
        reached = sum(counts.values(), torch.zeros(BINS, dtype=torch.int64)).cumsum(0)
        upper = int((reached >= wanted - sum(zeros.values())).nonzero()[0])
        for name, bins in counts.items():
            zeros[name] += int(bins[:upper].sum())
    left = wanted - sum(zeros.values())
    for name, bins in counts.items():
        ties = min(left, int(bins[upper]))
        zeros[name] += ties
        left -= ties
    return zeros


def _bins(weight: Tensor, upper: int | None) -> Tensor:
    """Return 16 bits of every |w|, ascending with it.

    Args:
        upper: the upper 16 of 32 bits; the lower bits of the weights that share them are returned.
    """
    if weight.element_size() == 2:
        return weight.view(torch.int16).flatten().int() & 0x7FFF
    bits = weight.view(torch.int32).flatten() & 0x7FFFFFFF
    return bits >> 16 if upper is None else bits[(bits >> 16) == upper] & 0xFFFF
