"""Rounding noise, put in after every block: how far a score moves if each block rounds a little differently.

Another batch size changes the order of a few sums, and on some kernels none, so its noise may be smaller than
that of another processor or library. Here every value x of every block's output becomes x (1 + size g), g of
mean 0 and variance 1. As with true rounding, g depends on nothing but the value and its place: the bits of x
and a draw of its feature go through a hash, whose four bytes add up to g (of at most 3.5). So neither the
batch nor the order of items changes it, a cached prefix has the noise of a fresh one, and an evaluation that
was killed continues with the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.core.lazy import torch
from stages.core.numbers import generator
from stages.model.blocks import blocks

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.controls.candidates import Injected

_WORD = 0xFFFFFFFF
_MULTIPLIER = 0x45D9F3B
"""Odd and below 2^31, so that its product with 32 bits fits into int64."""


def inject(model: nn.Module, rounding: Injected) -> None:
    """Make every block of the model add rounding noise to its output, for good.

    Raises:
        Refusal: the model has no list of blocks.
    """
    for number, (_, block) in enumerate(blocks(model)):
        block.register_forward_hook(_hook(rounding, f"{rounding.seed} rounding of block {number}"))


def _hook(rounding: Injected, draw: str) -> Any:
    keys: dict[tuple[int, torch.device], Tensor] = {}

    def hook(block: nn.Module, inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        place = (hidden.shape[-1], hidden.device)
        if place not in keys:
            keys[place] = torch.randint(_WORD + 1, place[:1], generator=generator(draw)).to(hidden.device)
        noisy = with_noise(hidden, keys[place], rounding.size)
        return (noisy, *output[1:]) if isinstance(output, tuple) else noisy

    return hook


def with_noise(values: Tensor, keys: Tensor, size: float) -> Tensor:
    """Return `values` `[..., features]` with noise of standard deviation `size` times each, in their dtype.

    Args:
        keys: `[features]` int64 below 2^32, a draw for each feature.
    """
    exact = values.float()
    word = (exact.view(torch.int32).long() & _WORD) ^ keys
    for _ in range(2):
        word = ((word >> 16) ^ word) * _MULTIPLIER & _WORD
    word = (word >> 16) ^ word
    total = sum((word >> shift) & 255 for shift in (0, 8, 16, 24))
    noise = (total - 4 * 127.5) / (4 * (256**2 - 1) / 12) ** 0.5
    return (exact * (1 + size * noise)).to(values.dtype)
