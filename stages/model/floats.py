"""Grids of small floating-point numbers: eight bits (E4M3) and four (E2M1).

A float's steps grow with its size, which suits weights, most of which are small. Eight bits reach 448 with
four significant bits; four bits are the eight magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign, and need a
scale every few columns to be of use. How that scale is stored is what tells the two formats apart: MXFP4
(Open Compute Project) has a power of two for 32 columns, NVFP4 (NVIDIA) an E4M3 number for 16 and one fp32
for the whole matrix. Both come to about as many bits: 4.25 and 4.5 a weight.

All grids have an exact 0, so a pruned weight stays pruned. compressed-tensors holds all three.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from stages.core.lazy import torch
from stages.model.grid import Quantized, stored

if TYPE_CHECKING:
    from torch import Tensor

E4M3_MAX = 448.0
E2M1_MAX = 6.0


@dataclass(frozen=True)
class Float8(Quantized):
    """E4M3 `codes` `[out, in]` times `scale`, `[out, 1]` or `[1]` in the storage dtype.

    With `dynamic` the inputs are rounded to E4M3 as well when the model runs, with one scale a token.
    """

    codes: Tensor
    scale: Tensor
    dynamic: bool = False
    bits = 8

    @classmethod
    def nearest(cls, weight: Tensor, *, by_row: bool, dynamic: bool) -> Self:
        """`weight` `[out, in]` with its largest value, of each row or of all, at 448."""
        peak = weight.float().abs().amax(1, keepdim=True) if by_row else weight.float().abs().amax().view(1)
        scale = stored(peak / E4M3_MAX, weight.dtype)
        return cls(_to_e4m3(weight, scale), scale.to(weight.dtype), dynamic)

    def requantize(self, weight: Tensor) -> Self:
        """`weight` `[out, in]` at the nearest numbers of the same scales, beyond 448 of them clamped."""
        return replace(self, codes=_to_e4m3(weight, self.scale))

    def dequantize(self) -> Tensor:
        """`[out, in]` in the scale's dtype."""
        return (self.codes.float() * self.scale.float()).to(self.scale.dtype)

    def stored_bits(self) -> int:
        """Codes and scales."""
        return self.codes.numel() * 8 + self.scale.numel() * self.scale.element_size() * 8

    def scheme(self) -> dict[str, Any]:
        """float-quantized where inputs are rounded too, else naive-quantized; the same in the file."""
        args = {"num_bits": 8, "type": "float", "symmetric": True}
        return {
            "format": "float-quantized" if self.dynamic else "naive-quantized",
            "weights": {**args, "strategy": "channel" if self.scale.ndim == 2 else "tensor"},
            "input_activations": {**args, "strategy": "token", "dynamic": True} if self.dynamic else None,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Codes and scales."""
        return {"weight": self.codes.cpu().contiguous(), "weight_scale": self.scale.cpu().contiguous()}

    @classmethod
    def read(cls, stored: Mapping[str, Tensor], name: str, scheme: Mapping[str, Any]) -> Self:
        """From a float-quantized or naive-quantized file."""
        return cls(stored[name], stored[f"{name}_scale"], scheme["input_activations"] is not None)


@dataclass(frozen=True)
class Float4(Quantized):
    """E2M1 `codes` `[out, in]` (the numbers themselves, fp32) with one scale for a few columns.

    `scale` `[out, groups]` is as it is stored, one byte each.
    """

    codes: Tensor
    scale: Tensor
    bits = 4

    def factor(self) -> Tensor:
        """What the codes of each group are multiplied by, `[out, groups]` fp32."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """`[out, in]` in bf16, in which the library computes them whatever the dtype of the model."""
        wide = self.factor().repeat_interleave(self.codes.shape[1] // self.scale.shape[1], 1)
        return (self.codes * wide).bfloat16()

    def requantize(self, weight: Tensor) -> Self:
        """`weight` `[out, in]` at the nearest numbers of the same scales, beyond 6 of them clamped."""
        groups = weight.float().unflatten(1, (self.scale.shape[1], -1))
        return replace(self, codes=_to_e2m1(groups / self.factor()[..., None]))

    def stored_bits(self) -> int:
        """Codes, and a byte a scale."""
        return self.codes.numel() * 4 + self.scale.numel() * 8

    def nonzero(self) -> int:
        """Codes that are not zero."""
        return int(torch.count_nonzero(self.codes))

    def tensors(self) -> dict[str, Tensor]:
        """Two codes a byte, and scales."""
        from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

        packed = pack_fp4_to_uint8(self.codes.cpu()).contiguous()
        return {"weight_packed": packed, "weight_scale": self.scale.cpu().contiguous()}


@dataclass(frozen=True)
class MXFP4(Float4):
    """E2M1 with the exponent of a power of two, biased by 127, for every 32 columns; `scale` is uint8."""

    group_size = 32

    @classmethod
    def nearest(cls, weight: Tensor) -> Self:
        """`weight` `[out, in]` rounded, the largest of a group between 3.5 and 7, beyond 6 clamped.

        That is the power of two below its largest, less the 2^2 of E2M1's, and one more from 1.75 times
        that power on: there clamping to 6 would cost more than the coarser steps. As the library has it.
        """
        groups = weight.float().unflatten(1, (-1, cls.group_size))
        mantissa, exponent = groups.abs().amax(2).frexp()  # mantissa in [0.5, 1)
        exponent = exponent - 3 + (mantissa >= 0.875).int()
        scale = (exponent + 127).clamp(1, 254).to(torch.uint8)
        return cls(_to_e2m1(groups / _power(scale)[..., None]), scale)

    def factor(self) -> Tensor:
        """The powers of two."""
        return _power(self.scale)

    def scheme(self) -> dict[str, Any]:
        """mxfp4-pack-quantized, weights only."""
        return _e2m1("mxfp4-pack-quantized", "group", self.group_size, "torch.uint8")

    @classmethod
    def read(cls, stored: Mapping[str, Tensor], name: str, scheme: Mapping[str, Any]) -> Self:
        """From an mxfp4-pack-quantized file."""
        return cls(_unpacked(stored, name), stored[f"{name}_scale"])


@dataclass(frozen=True)
class NVFP4(Float4):
    """E2M1 with an E4M3 scale for every 16 columns, which `global_scale` `[1]` fp32 divides."""

    global_scale: Tensor
    group_size = 16

    @classmethod
    def nearest(cls, weight: Tensor) -> Self:
        """`weight` `[out, in]` rounded, the largest of a group at 6, the largest scale at 448."""
        groups = weight.float().unflatten(1, (-1, cls.group_size))
        peaks = groups.abs().amax(2)
        peak = peaks.amax().view(1)
        whole = (E4M3_MAX * E2M1_MAX / peak).clamp(max=torch.finfo(torch.float32).max)
        whole = torch.where(peak == 0, 1.0, whole)
        scale = (whole * (peaks / E2M1_MAX)).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
        # A group too small for any scale is rounded by the smallest.
        scale = torch.where(scale.float() == 0, 2.0**-9, scale.float()).to(torch.float8_e4m3fn)
        return cls(_to_e2m1(groups / (scale.float() / whole)[..., None]), scale, whole)

    def factor(self) -> Tensor:
        """The quotients of both scales."""
        return self.scale.float() / self.global_scale

    def stored_bits(self) -> int:
        """Codes, scales, and the scale of scales."""
        return super().stored_bits() + 32

    def scheme(self) -> dict[str, Any]:
        """nvfp4-pack-quantized, weights only."""
        return _e2m1("nvfp4-pack-quantized", "tensor_group", self.group_size, "torch.float8_e4m3fn")

    def tensors(self) -> dict[str, Tensor]:
        """Two codes a byte, scales, and the scale of scales."""
        return {**super().tensors(), "weight_global_scale": self.global_scale.cpu()}

    @classmethod
    def read(cls, stored: Mapping[str, Tensor], name: str, scheme: Mapping[str, Any]) -> Self:
        """From an nvfp4-pack-quantized file."""
        return cls(_unpacked(stored, name), stored[f"{name}_scale"], stored[f"{name}_global_scale"])


def _to_e4m3(weight: Tensor, scale: Tensor) -> Tensor:
    """Nearest E4M3 numbers of `weight` `[out, in]` over `scale`, clamped to the largest."""
    return (weight.float() / scale.float()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _power(scale: Tensor) -> Tensor:
    """Powers of two from exponents biased by 127, fp32."""
    return torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127)


def _to_e2m1(groups: Tensor) -> Tensor:
    """Nearest E2M1 numbers, halves to the even mantissa, `[out, groups, columns]` to `[out, in]`."""
    from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4

    return cast_to_fp4(groups.flatten(1)) + 0.0  # no -0


def _unpacked(stored: Mapping[str, Tensor], name: str) -> Tensor:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    packed = stored[f"{name}_packed"]
    return unpack_fp4_from_uint8(packed, packed.shape[0], packed.shape[1] * 2, torch.float32)


def _e2m1(layout: str, strategy: str, group_size: int, scale_dtype: str) -> dict[str, Any]:
    args = {
        "num_bits": 4, "type": "float", "symmetric": True, "strategy": strategy, "group_size": group_size,
        "scale_dtype": scale_dtype,
    }  # fmt: skip
    # Unpacked at the first forward, weights would be bf16 in a model of any dtype.
    return {"format": layout, "weights": args, "input_activations": None, "dequantize": True}
