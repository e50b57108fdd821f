"""The number grid of a quantized weight: integer codes times a scale a group.

A weight `[out, in]` is cut along its input into groups of `group_size` columns (one group a row when
`group_size` is null). Each group has one scale; a value is `code * scale` with a signed integer code of
`bits` bits. The grid is symmetric, so code 0 is exactly 0 and a pruned weight stays pruned. The range is
that of compressed-tensors, [-2^(bits-1), 2^(bits-1) - 1], with scale = max|w| / ((2^bits - 1) / 2).

Scales are rounded to the dtype they are stored in *before* anything is rounded to the grid, so that the
codes are the best ones for the scales a reader will find.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """A quantized weight: `codes` `[out, in]` int8 and `scale` `[out, groups]` in the storage dtype."""

    codes: Tensor
    scale: Tensor
    bits: int
    group_size: int | None

    def dequantize(self) -> Tensor:
        """`[out, in]` in the scale's dtype: code times scale, rounded once."""
        return dequantize(self.codes, self.scale, self.group_size)


def bounds(bits: int) -> tuple[int, int]:
    """Smallest and largest code."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def scale_of(group: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Scale of each row of `group` `[out, columns]`, `[out, 1]` fp32, rounded to `dtype`.

    A group of zeros gets scale 1, as any scale serves it.
    """
    scale = group.abs().amax(1, keepdim=True) / ((2**bits - 1) / 2)
    scale = scale.to(dtype).float()
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def round_to_codes(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Nearest codes of `values`, fp32, halves to even, clamped to the range."""
    low, high = bounds(bits)
    return (values / scale).round().clamp(low, high)


def dequantize(codes: Tensor, scale: Tensor, group_size: int | None) -> Tensor:
    """`[out, in]` in the scale's dtype from codes `[out, in]` and scales `[out, groups]`."""
    wide = scale.repeat_interleave(group_size or codes.shape[1], 1)
    return (codes.float() * wide.float()).to(scale.dtype)
