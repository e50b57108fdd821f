"""The LoRA layer whose update leaves frozen weights alone; apart, as it imports peft."""

from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from torch.nn import functional as F


class MaskedLinear(LoraLinear):
    """A LoRA layer whose update is confined to the positions of its base weight that are `moving`."""

    moving: Tensor
    """1 where it is added and 0 elsewhere, shaped as the base weight is stored; to be set before use."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The masked update, shaped as the base weight is stored; also what the merge adds."""
        delta = self.lora_B[adapter].weight @ self.lora_A[adapter].weight * self.scaling[adapter]
        delta = delta.T if self.fan_in_fan_out else delta
        return (delta * self.moving).to(self.get_base_layer().weight.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (W + M * BA)T + bias."""
        base = self.get_base_layer()
        weight = base.weight
        if not (self.merged or self.disable_adapters):
            for adapter in self.active_adapters:
                weight = weight + self.get_delta_weight(adapter)
        return F.linear(x, weight.T if self.fan_in_fan_out else weight, base.bias)
