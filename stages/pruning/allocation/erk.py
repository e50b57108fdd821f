"""ERK (Erdos-Renyi, 1911.11134): small matrices keep more.

A matrix keeps a share proportional to (rows + columns) / (rows * columns). Matrices that would keep more than
everything are left dense, and the others lose more to make up for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.model.blocks import linears
from stages.pruning.allocation.shares import Allocation

if TYPE_CHECKING:
    from torch import Tensor

    from stages.model.source import Empty


class ERK(Allocation):
    """Keep a share proportional to (rows + columns) / (rows * columns) of every matrix."""

    kind: Literal["erk"]

    def shares(
        self,
        source: Empty,
        ignore: tuple[str, ...],
        sparsity: float,
        windows: Tensor | None,
        batch_size: int | None = None,
    ) -> dict[str, float]:
        """Compute the shares from the shapes alone."""
        targets = linears(source.model, ignore)
        sizes = {linear.name: linear.weight.numel() for linear in targets}
        density = {linear.name: sum(linear.weight.shape) / linear.weight.numel() for linear in targets}
        dense: set[str] = set()
        while rest := [name for name in density if name not in dense]:
            kept = (1 - sparsity) * sum(sizes.values()) - sum(sizes[name] for name in dense)
            factor = kept / sum(density[name] * sizes[name] for name in rest)
            over = {name for name in rest if factor * density[name] > 1}
            if not over:
                return {name: 0.0 if name in dense else 1 - factor * density[name] for name in density}
            dense |= over
        return dict.fromkeys(density, 0.0)  # at sparsity 0, where rounding may put a share above 1
