"""Magnitude pruning: the smallest weights go. Needs no data.

The scope decides the result. `global` has one threshold over all pruned matrices (Junk DNA, 2310.02277),
`matrix` compares weights within one linear (the baseline of the Wanda and SparseGPT papers), `row` within
one output row. Under `global` ties at the threshold fall to the linear that comes first. With `structure:
N:M` weights are compared within their M alone: `matrix` and `row` are the same and `global` is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from stages.core.lazy import torch
from stages.core.numbers import count_of
from stages.corpus.windows import OptionalTokens
from stages.pruning.allocation import Uniform
from stages.pruning.pruner import Pruner

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from stages.model.stream import Empty

BINS = 2**16


class Magnitude(Pruner):
    """Zero the share `sparsity` of weights with the smallest |w|."""

    method: Literal["magnitude"]
    scope: Literal["global", "matrix", "row"]
    calibration: OptionalTokens
    """Read by an allocation that is measured on text, by nothing else."""

    @model_validator(mode="after")
    def _one_threshold(self) -> Self:
        if self.scope == "global" and (self.pattern or not isinstance(self.allocation, Uniform)):
            raise ValueError("scope global is an allocation of its own; leave structure and allocation out")
        return self

    @property
    def by_row(self) -> bool:
        """Where the scope says so."""
        return self.scope == "row"

    def plan(self, source: Empty, windows: Callable[[], Tensor]) -> dict[str, int]:
        """Zeros of each linear; under `global` as many as it has below the one threshold."""
        if self.scope == "global":
            return global_zeros(source, self.ignore, self.sparsity)
        return super().plan(source, windows)

    def weights(self, weight: Tensor, statistic: None, zeros: int) -> Tensor:
        """Prune `weight` `[out, in]`, any float dtype; the survivors are untouched."""
        return self.pruned(weight, lambda rows: weight[rows].float().abs(), zeros)


def global_zeros(source: Empty, ignore: tuple[str, ...], sparsity: float) -> dict[str, int]:
    """How many weights of each linear are among the share `sparsity` of smallest |w| of them all.

    Blocks are looked at one at a time and nothing is sorted: |w| in 16 bits has 2^15 values, which are
    counted, and the value at the threshold is shared out to linears in order. In fp32 the upper 16 bits are
    counted first, then the lower ones of those that share the threshold's upper ones.
    """
    from stages.model.blocks import blocks, linears

    found = linears(source.model, ignore)
    target = count_of(sparsity, sum(one.weight.numel() for one in found))
    zeros = dict.fromkeys((one.name for one in found), 0)
    upper: int | None = None
    counted: dict[str, Tensor] = {}
    for _ in range(found[0].weight.element_size() // 2):
        for name, block in blocks(source.model):
            with source.block(name, block):
                for one in (one for one in found if one.block == name):
                    counted[one.name] = torch.bincount(_bins(one.weight, upper), minlength=BINS).cpu()
        reached = sum(counted.values(), torch.zeros(BINS, dtype=torch.int64)).cumsum(0)
        upper = int((reached >= target - sum(zeros.values())).nonzero()[0])
        for name, bins in counted.items():
            zeros[name] += int(bins[:upper].sum())
    left = target - sum(zeros.values())
    for name, bins in counted.items():
        ties = min(left, int(bins[upper]))
        zeros[name] += ties
        left -= ties
    return zeros


def _bins(weight: Tensor, upper: int | None) -> Tensor:
    """16 bits of every |w|, ascending with it; given the upper 16 of 32, the lower ones of those alike."""
    if weight.element_size() == 2:
        return weight.view(torch.int16).flatten().int() & 0x7FFF
    bits = weight.view(torch.int32).flatten() & 0x7FFFFFFF
    return bits >> 16 if upper is None else bits[(bits >> 16) == upper] & 0xFFFF
