"""Frozen weights: zero their gradients before these count in the clipped norm or in a moment.

Masks hold one byte a weight and are applied once a step, however many micro-batches it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from stages.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def trainable_mask(frozen: Tensor) -> Tensor:
    """Return 1 where weights train and 0 where `frozen`, int8; a CPU multiplies faster than it fills."""
    return (~frozen).view(torch.int8)


class GradientMasks:
    """The masks of some parameters' gradients.

    Args:
        weights: parameters with fp32 gradients, by name.
        trainable: masks of some of them, see `trainable_mask`, on one device. A mask may be changed in place
            later.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], trainable: Mapping[str, Tensor]) -> None:
        self._masked = [(weights[name], mask) for name, mask in trainable.items()]
        # A CPU would allocate an fp32 copy of each mask to multiply by it; other devices cast on the fly.
        sizes = [mask.numel() for mask in trainable.values() if mask.device.type == "cpu"]
        self._wide = torch.empty(max(sizes), dtype=torch.float32) if sizes else None

    def apply(self) -> None:
        """Multiply each gradient by its mask."""
        for weight, mask in self._masked:
            if weight.grad is None:
                continue
            if self._wide is not None:
                mask = self._wide[: mask.numel()].view(mask.shape).copy_(mask)
            weight.grad.mul_(mask)
