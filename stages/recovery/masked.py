"""The LoRA layer whose update leaves frozen weights alone; a file of its own, as it imports peft."""

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from torch.nn import functional as F


class MaskedLinear(LoraLinear):
    """A LoRA layer that updates only the trainable positions of its base weight."""

    trainable_mask: Tensor
    """1 where the update is added and 0 elsewhere, shaped as the base weight is stored; set it before use."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the masked update, shaped as the base weight is stored; the merge adds the same."""
        return _update(*self._factors(adapter)).to(self.get_base_layer().weight.dtype) * self.trainable_mask

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return x (W + M * BA)T + bias."""
        base = self.get_base_layer()
        weight = base.weight
        if not (self.merged or self.disable_adapters):
            for adapter in self.active_adapters:
                weight = _Updated.apply(weight, self.trainable_mask, *self._factors(adapter))
        return F.linear(x, weight.T if self.fan_in_fan_out else weight, base.bias)

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor, float, bool]:
        """Return A, B, alpha / rank, and whether the base weight is stored as `[in, out]`."""
        down, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return down, up, self.scaling[adapter], self.fan_in_fan_out


class _Updated(torch.autograd.Function):
    """W + M * BA with few passes over matrices of W's size; its gradient reaches A and B alone."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, mask: Tensor, down: Tensor, up: Tensor, scale: float, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(mask, down, up)
        ctx.scale, ctx.transposed = scale, transposed
        return torch.addcmul(weight, _update(down, up, scale, transposed).to(weight.dtype), mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mask, down, up = ctx.saved_tensors
        (gradient,) = gradients
        wide = torch.empty_like(gradient, dtype=down.dtype)
        torch.mul(gradient, mask, out=wide)
        wide = wide.T if ctx.transposed else wide
        return None, None, (up.T @ wide) * ctx.scale, (wide @ down.T) * ctx.scale, None, None


def _update(down: Tensor, up: Tensor, scale: float, transposed: bool) -> Tensor:
    """Return BA times `scale`, in the dtype of A and B, shaped as the base weight is stored.

    Args:
        down: A, `[rank, in]`.
        up: B, `[out, rank]`.
        scale: alpha / rank; B is scaled, which is small and, for a power of two, gives the same bits.
        transposed: whether the weight is stored as `[in, out]`.
    """
    product = (up * scale) @ down
    return product.T if transposed else product
