"""The number grid of a quantized weight: integer codes times a scale a group.

A weight `[out, in]` is cut along its input into groups of `group_size` columns (one group a row when
`group_size` is null). Each group has one scale; a value is `code * scale` with a signed integer code of
`bits` bits. The grid is symmetric, so code 0 is exactly 0 and a pruned weight stays pruned. The range is
that of compressed-tensors, [-2^(bits-1), 2^(bits-1) - 1], with scale = max|w| / ((2^bits - 1) / 2).

Scales are rounded to the dtype they are stored in *before* anything is rounded to the grid, so that the
codes are the best ones for the scales a reader will find.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Quantized:
    """A weight `[out, in]` on a number grid, as it will be stored."""

    bits: int
    """Of one code."""

    def dequantize(self) -> Tensor:
        """`[out, in]` in the dtype of computation."""
        raise NotImplementedError

    def stored_bits(self) -> int:
        """Bits of the codes and of everything needed to read them (scales, zero points)."""
        raise NotImplementedError

    def nonzero(self) -> int:
        """Entries that dequantize to something else than zero."""
        return int(torch.count_nonzero(self.dequantize()))

    def scheme(self) -> dict[str, Any] | None:
        """`format`, `weights` and `input_activations` as compressed-tensors names them; None: it cannot."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the suffix compressed-tensors gives it (`weight_packed`, ...)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Codes(Quantized):
    """Integer codes: `codes` `[out, in]` int8 and `scale` `[out, groups]` in the storage dtype."""

    codes: Tensor
    scale: Tensor
    bits: int
    group_size: int | None

    def dequantize(self) -> Tensor:
        """`[out, in]` in the scale's dtype: code times scale, rounded once."""
        return dequantize(self.codes, self.scale, self.group_size)

    def stored_bits(self) -> int:
        """Codes and scales."""
        return self.codes.numel() * self.bits + self.scale.numel() * self.scale.element_size() * 8

    def nonzero(self) -> int:
        """Codes that are not zero."""
        return int(torch.count_nonzero(self.codes))

    def scheme(self) -> dict[str, Any]:
        """pack-quantized, symmetric, one scale a group or a row."""
        args = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group" if self.group_size else "channel",
            "group_size": self.group_size,
        }
        return {"format": "pack-quantized", "weights": args, "input_activations": None}

    def tensors(self) -> dict[str, Tensor]:
        """Codes packed into int32 words, scales, and the shape, which padding of the words hides."""
        from compressed_tensors.compressors.pack_quantized import pack_to_int32

        return {
            "weight_packed": pack_to_int32(self.codes.cpu(), self.bits).contiguous(),
            "weight_scale": self.scale.cpu().contiguous(),
            "weight_shape": torch.tensor(self.codes.shape),
        }


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
