"""NF4 (QLoRA, 2305.14314): the sixteen levels at which normally distributed weights are used equally often.

Each group of columns is divided by its largest magnitude and rounded to quantiles of a normal distribution,
scaled to [-1, 1]: eight above zero, seven below, and 0 itself, so a pruned weight stays pruned. Needs no
data. With `double_quant` the scales are rounded as well: their mean is taken off, and each 256 of them in
a row become E4M3 numbers with one fp32 scale, for 4.13 bits a weight instead of 4.5 at 64 columns a group.

No format of compressed-tensors knows these levels: the checkpoint is dense and marked `fake_quantized`, and
its `bits_per_weight` is what the codes would take.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stages.core.lazy import torch
from stages.core.schema import NoData
from stages.model.floats import E4M3_MAX
from stages.model.grid import Quantized
from stages.quantization.quantizer import Quantizer

if TYPE_CHECKING:
    from torch import Tensor

OUTERMOST = (1 - 1 / 30 + 1 - 1 / 32) / 2
"""The quantile that becomes 1: halfway between those at which 15 and 16 equal bins end, less half a bin."""
SCALES = 256
"""Scales that share an fp32 scale of their own."""


def levels() -> Tensor:
    """The 16 levels, ascending, `[16]` fp32."""
    quantile = NormalDist().inv_cdf

    def side(count: int) -> list[float]:
        """`count` quantiles evenly between the outermost and one half, that not among them."""
        step = (OUTERMOST - 0.5) / count
        return [quantile(OUTERMOST - i * step) / quantile(OUTERMOST) for i in range(count)]

    return torch.tensor([*(-level for level in side(7)), 0.0, *reversed(side(8))])


@dataclass(frozen=True)
class NormalFloat(Quantized):
    """Indices of levels `[out, in]` uint8 and scales `[out, groups]` fp32, as a reader would have them."""

    indices: Tensor
    scale: Tensor
    dtype: torch.dtype
    scale_bits: int
    """Of all scales, as stored."""
    bits = 4

    def dequantize(self) -> Tensor:
        """`[out, in]` in the dtype of the weight: level times scale, rounded once."""
        wide = self.scale.repeat_interleave(self.indices.shape[1] // self.scale.shape[1], 1)
        return (levels().to(self.scale.device)[self.indices.int()] * wide).to(self.dtype)

    def stored_bits(self) -> int:
        """Indices and scales."""
        return self.indices.numel() * 4 + self.scale_bits


class NF4(Quantizer):
    """Round each weight to the nearest of 16 normal quantiles, times the largest magnitude of its group."""

    method: Literal["nf4"]
    bits: Literal[4] = 4
    group_size: Annotated[int, Field(ge=8)] | None = 64
    double_quant: bool = False
    """Whether the scales are rounded to eight bits too."""
    calibration: NoData

    def weights(self, weight: Tensor, statistic: None) -> NormalFloat:
        """Codes of `weight` `[out, in]`."""
        groups = weight.float().reshape(len(weight), -1, self.group_size or weight.shape[1])
        scale, bits = groups.abs().amax(2), 32
        stored = scale.numel() * bits
        if self.double_quant:
            scale, stored = rounded(scale)
        ratio = groups / torch.where(scale == 0, 1.0, scale)[..., None]
        table = levels().to(weight.device)
        # The nearest level's index is the number of midpoints below.
        indices = torch.bucketize(ratio.contiguous(), (table[1:] + table[:-1]) / 2)
        return NormalFloat(indices.view(weight.shape).to(torch.uint8), scale, weight.dtype, stored)


def rounded(scale: Tensor) -> tuple[Tensor, int]:
    """Scales `[out, groups]` as eight-bit floats about their mean would give them back, and their bits."""
    flat, mean = scale.flatten(), scale.mean()
    chunks = torch.nn.functional.pad(flat - mean, (0, -len(flat) % SCALES)).view(-1, SCALES)
    unit = chunks.abs().amax(1, keepdim=True) / E4M3_MAX
    codes = (chunks / torch.where(unit == 0, 1.0, unit)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    back = (codes.float() * unit).flatten()[: len(flat)] + mean
    return back.clamp(min=0).view(scale.shape), len(flat) * 8 + unit.numel() * 32 + 32
