"""NF4 (QLoRA, 2305.14314): sixteen levels that normally distributed weights use equally often.

Each group of columns is divided by its largest magnitude and rounded to quantiles of a normal distribution,
scaled to [-1, 1]: eight above zero, seven below, and 0 itself, so a pruned weight stays pruned. Needs no
data. With `double_quant` the scales are rounded as well: their mean is subtracted, and every 256 in a row
become E4M3 numbers with one fp32 scale, for 4.13 bits per weight instead of 4.5 at 64 columns per group.

No format of compressed-tensors knows these levels, so the checkpoint is dense and marked `fake_quantized`;
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
from stages.model.grid import Quantized, divided
from stages.quantization.quantizer import Quantizer

if TYPE_CHECKING:
    from torch import Tensor

_OUTERMOST = (1 - 1 / 30 + 1 - 1 / 32) / 2
"""The quantile mapped to 1: the mean of the centres of the last of 15 and of 16 equal bins."""
_SCALES_PER_CHUNK = 256
"""Scales that share an fp32 scale of their own."""


def levels() -> Tensor:
    """Return the 16 levels, ascending, `[16]` fp32."""
    quantile = NormalDist().inv_cdf

    def side(count: int) -> list[float]:
        """Return `count` evenly spaced quantiles from the outermost down to, but not including, one half."""
        step = (_OUTERMOST - 0.5) / count
        return [quantile(_OUTERMOST - i * step) / quantile(_OUTERMOST) for i in range(count)]

    return torch.tensor([*(-level for level in side(7)), 0.0, *reversed(side(8))])


@dataclass(frozen=True)
class NormalFloat(Quantized):
    """Indices of levels `[out, in]` uint8, and scales `[out, groups]` fp32 as a reader would restore them."""

    indices: Tensor
    scale: Tensor
    dtype: torch.dtype
    scale_bits: int
    """Bits of all scales together, as stored."""
    bits = 4

    def dequantize(self) -> Tensor:
        """Return level times scale `[out, in]`, rounded once to the dtype of the weight."""
        wide = self.scale.repeat_interleave(self.indices.shape[1] // self.scale.shape[1], 1)
        return (levels().to(self.scale.device)[self.indices.int()] * wide).to(self.dtype)

    def stored_bits(self) -> int:
        """Return the bits of indices and scales."""
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
        """Return the codes of `weight` `[out, in]`."""
        groups = weight.float().reshape(len(weight), -1, self.group_size or weight.shape[1])
        scale = groups.abs().amax(2)
        scale_bits = scale.numel() * 32
        if self.double_quant:
            scale, scale_bits = round_scales(scale)
        ratio = groups / torch.where(scale == 0, 1.0, scale)[..., None]
        table = levels().to(weight.device)
        # The index of the nearest level is the number of midpoints below.
        indices = torch.bucketize(ratio.contiguous(), (table[1:] + table[:-1]) / 2)
        return NormalFloat(indices.view(weight.shape).to(torch.uint8), scale, weight.dtype, scale_bits)


def round_scales(scale: Tensor) -> tuple[Tensor, int]:
    """Round scales `[out, groups]` to eight-bit floats about their mean; return them and their bits."""
    flat, mean = scale.flatten(), scale.mean()
    padding = -len(flat) % _SCALES_PER_CHUNK
    chunks = torch.nn.functional.pad(flat - mean, (0, padding)).view(-1, _SCALES_PER_CHUNK)
    unit = divided(chunks.abs().amax(1, keepdim=True), E4M3_MAX)
    codes = (chunks / torch.where(unit == 0, 1.0, unit)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    rounded = (codes.float() * unit).flatten()[: len(flat)] + mean
    return rounded.clamp(min=0).view(scale.shape), len(flat) * 8 + unit.numel() * 32 + 32
