"""The LoRA layer whose update leaves frozen weights alone; a file of its own, as it imports peft."""

from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from torch.nn import functional as F


class MaskedLinear(LoraLinear):
    """A LoRA layer that updates only the trainable positions of its base weight."""

    trainable_mask: Tensor
    """1 where the update is added and 0 elsewhere, shaped as the base weight is stored; set it before use."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the masked update, shaped as the base weight is stored; the merge adds the same."""
        delta = self.lora_B[adapter].weight @ self.lora_A[adapter].weight * self.scaling[adapter]
        delta = delta.T if self.fan_in_fan_out else delta
        return delta.to(self.get_base_layer().weight.dtype) * self.trainable_mask

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return x (W + M * BA)T + bias."""
        base = self.get_base_layer()
        weight = base.weight
        if not (self.merged or self.disable_adapters):
            for adapter in self.active_adapters:
                weight = weight + self.get_delta_weight(adapter)
        return F.linear(x, weight.T if self.fan_in_fan_out else weight, base.bias)
