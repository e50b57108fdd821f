"""Frozen weights: zero their gradients before these count in the clipped norm or in a moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from stages.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def trainable_mask(frozen: Tensor) -> Tensor:
    """Return 1 where weights train and 0 where `frozen`, int8; a CPU multiplies faster than it fills."""
    return (~frozen).view(torch.int8)


def mask_gradients(weights: Mapping[str, nn.Parameter], trainable: Mapping[str, Tensor]) -> None:
    """Multiply the gradient of each weight by its mask as soon as a backward pass has added to it.

    Args:
        weights: parameters with fp32 gradients, by name.
        trainable: masks of some of them, see `trainable_mask`, on one device. A mask may be changed in place
            later.
    """
    if not trainable:
        return
    first, largest = next(iter(trainable.values())), max(mask.numel() for mask in trainable.values())
    scratch = first.new_empty(largest, dtype=torch.float32)
    for name, mask in trainable.items():
        weights[name].register_post_accumulate_grad_hook(_masking(mask, scratch))


def _masking(trainable: Tensor, scratch: Tensor) -> Callable[[Tensor], None]:
    """Return a hook that masks the gradient of its parameter.

    The mask is cast to fp32 in `scratch` first, as a product of mixed dtypes would allocate the same.
    """
    wide = scratch[: trainable.numel()].view(trainable.shape)

    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        weight.grad.mul_(wide.copy_(trainable))

    return hook
