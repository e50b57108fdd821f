"""Grids of small floating-point numbers: eight bits (E4M3) and four bits (E2M1).

A float's steps grow with its size, which suits weights, most of which are small. Eight bits reach 448 with
four significant bits. Four bits are the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign, and need a scale
every few columns. The two four-bit formats differ in that scale: MXFP4 (Open Compute Project) has a power of
two per 32 columns, NVFP4 (NVIDIA) an E4M3 number per 16 columns and one fp32 number per matrix. They take
4.25 and 4.5 bits a weight.

All grids have an exact 0, so a pruned weight stays pruned. compressed-tensors stores all three.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from stages.core.lazy import torch
from stages.model.grid import Quantized, divided, round_scale

if TYPE_CHECKING:
    from torch import Tensor

E4M3_MAX = 448.0
E2M1_MAX = 6.0


@dataclass(frozen=True)
class Float8(Quantized):
    """E4M3 codes times a scale per row or per matrix."""

    codes: Tensor
    """`[out, in]` E4M3."""
    scale: Tensor
    """`[out, 1]` or `[1]`, in the dtype it is stored in."""
    dynamic: bool = False
    """Whether inputs are rounded to E4M3 when the model runs, with one scale per token."""
    bits = 8

    @classmethod
    def nearest(cls, weight: Tensor, *, by_row: bool, dynamic: bool) -> Self:
        """Round `weight`, `[out, in]`, scaled so that the largest value (of each row or of all) is 448."""
        peak = weight.float().abs().amax(1, keepdim=True) if by_row else weight.float().abs().amax().view(1)
        scale = round_scale(divided(peak, E4M3_MAX), weight.dtype)
        return cls(_to_e4m3(weight, scale), scale.to(weight.dtype), dynamic)

    def requantize(self, weight: Tensor) -> Self:
        """Round `weight`, `[out, in]`, with the same scales, clamped to 448 times the scale."""
        return replace(self, codes=_to_e4m3(weight, self.scale))

    def dequantize(self) -> Tensor:
        """Return `[out, in]` in the scale's dtype."""
        return (self.codes.float() * self.scale.float()).to(self.scale.dtype)

    def stored_bits(self) -> int:
        """Count codes and scales."""
        return self.codes.numel() * 8 + self.scale.numel() * self.scale.element_size() * 8

    def scheme(self) -> dict[str, Any]:
        """Return float-quantized if inputs are rounded too, else naive-quantized; the files are the same."""
        args = {"num_bits": 8, "type": "float", "symmetric": True}
        return {
            "format": "float-quantized" if self.dynamic else "naive-quantized",
            "weights": {**args, "strategy": "channel" if self.scale.ndim == 2 else "tensor"},
            "input_activations": {**args, "strategy": "token", "dynamic": True} if self.dynamic else None,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return codes and scales."""
        return {"weight": self.codes.cpu().contiguous(), "weight_scale": self.scale.cpu().contiguous()}

    @classmethod
    def read(cls, stored: Mapping[str, Tensor], name: str, scheme: Mapping[str, Any]) -> Self:
        """Read from a float-quantized or naive-quantized file."""
        return cls(stored[name], stored[f"{name}_scale"], scheme["input_activations"] is not None)


@dataclass(frozen=True)
class Float4(Quantized):
    """E2M1 codes with a scale every few columns."""

    codes: Tensor
    """`[out, in]` fp32, the E2M1 numbers themselves."""
    scale: Tensor
    """`[out, groups]` as stored, one byte each."""
    bits = 4

    def factor(self) -> Tensor:
        """Return the number that the codes of each group are multiplied by, `[out, groups]` fp32."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """Return `[out, in]` in bf16, in which the library computes it for a model of any dtype."""
        factor = self.factor().repeat_interleave(self.codes.shape[1] // self.scale.shape[1], 1)
        return (self.codes * factor).bfloat16()

    def requantize(self, weight: Tensor) -> Self:
        """Round `weight`, `[out, in]`, with the same scales, clamped to 6 times the scale."""
        groups = weight.float().unflatten(1, (self.scale.shape[1], -1))
        return replace(self, codes=_to_e2m1(groups / self.factor()[..., None]))

    def stored_bits(self) -> int:
        """Count codes, and a byte per scale."""
        return self.codes.numel() * 4 + self.scale.numel() * 8

    def nonzero(self) -> int:
        """Count the codes that are not zero."""
        return int(torch.count_nonzero(self.codes))

    def tensors(self) -> dict[str, Tensor]:
        """Return codes, two per byte, and scales."""
        from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

        packed = pack_fp4_to_uint8(self.codes.cpu()).contiguous()
        return {"weight_packed": packed, "weight_scale": self.scale.cpu().contiguous()}


@dataclass(frozen=True)
class MXFloat4(Float4):
    """E2M1 with a power of two per 32 columns; `scale` is its exponent plus 127, uint8."""

    group_size = 32

    @classmethod
    def nearest(cls, weight: Tensor) -> Self:
        """Round `weight`, `[out, in]`, scaled so that a group's largest is in [3.5, 7); above 6 is clamped.

        The scale is the power of two at or below a group's largest over 2^2, the power of two in E2M1's 6. It
        is doubled from 1.75 times that power on, where clamping to 6 would cost more than coarser steps. The
        library does the same.
        """
        groups = weight.float().unflatten(1, (-1, cls.group_size))
        mantissa, exponent = groups.abs().amax(2).frexp()  # mantissa in [0.5, 1)
        exponent = exponent - 3 + (mantissa >= 0.875).int()
        scale = (exponent + 127).clamp(1, 254).to(torch.uint8)
        return cls(_to_e2m1(groups / _power(scale)[..., None]), scale)

    def factor(self) -> Tensor:
        """Return the powers of two."""
        return _power(self.scale)

    def scheme(self) -> dict[str, Any]:
        """Return mxfp4-pack-quantized, weights only."""
        return _e2m1("mxfp4-pack-quantized", "group", self.group_size, "torch.uint8")

    @classmethod
    def read(cls, stored: Mapping[str, Tensor], name: str, scheme: Mapping[str, Any]) -> Self:
        """Read from an mxfp4-pack-quantized file."""
        return cls(_unpack(stored, name), stored[f"{name}_scale"])


@dataclass(frozen=True)
class NVFloat4(Float4):
    """E2M1 with an E4M3 scale per 16 columns, all of them divided by one number."""

    global_scale: Tensor
    """The divisor, `[1]` fp32."""
    group_size = 16

    @classmethod
    def nearest(cls, weight: Tensor) -> Self:
        """Round `weight`, `[out, in]`, scaled so that a group's largest is 6 and the largest scale 448."""
        groups = weight.float().unflatten(1, (-1, cls.group_size))
        peaks = groups.abs().amax(2)
        peak = peaks.amax().view(1)
        divisor = (E4M3_MAX * E2M1_MAX / peak).clamp(max=torch.finfo(torch.float32).max)
        divisor = torch.where(peak == 0, 1.0, divisor)
        scale = (divisor * divided(peaks, E2M1_MAX)).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
        # A group too small for any scale gets the smallest.
        scale = torch.where(scale.float() == 0, 2.0**-9, scale.float()).to(torch.float8_e4m3fn)
        return cls(_to_e2m1(groups / (scale.float() / divisor)[..., None]), scale, divisor)

    def factor(self) -> Tensor:
        """Return each scale over `global_scale`."""
        return self.scale.float() / self.global_scale

    def stored_bits(self) -> int:
        """Count codes, scales and `global_scale`."""
        return super().stored_bits() + 32

    def scheme(self) -> dict[str, Any]:
        """Return nvfp4-pack-quantized, weights only."""
        return _e2m1("nvfp4-pack-quantized", "tensor_group", self.group_size, "torch.float8_e4m3fn")

    def tensors(self) -> dict[str, Tensor]:
        """Return codes, two per byte, scales and `global_scale`."""
        return {**super().tensors(), "weight_global_scale": self.global_scale.cpu()}

    @classmethod
    def read(cls, stored: Mapping[str, Tensor], name: str, scheme: Mapping[str, Any]) -> Self:
        """Read from an nvfp4-pack-quantized file."""
        return cls(_unpack(stored, name), stored[f"{name}_scale"], stored[f"{name}_global_scale"])


def _to_e4m3(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the nearest E4M3 numbers of `weight` `[out, in]` over `scale`, clamped to the largest."""
    return (weight.float() / scale.float()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _power(scale: Tensor) -> Tensor:
    """Return powers of two, fp32, from exponents plus 127."""
    return torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127)


def _to_e2m1(groups: Tensor) -> Tensor:
    """Round `[out, groups, columns]` to the nearest E2M1 numbers `[out, in]`, ties to the even mantissa."""
    from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4

    return cast_to_fp4(groups.flatten(1)) + 0.0  # no -0


def _unpack(stored: Mapping[str, Tensor], name: str) -> Tensor:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    packed = stored[f"{name}_packed"]
    return unpack_fp4_from_uint8(packed, packed.shape[0], packed.shape[1] * 2, torch.float32)


def _e2m1(layout: str, strategy: str, group_size: int, scale_dtype: str) -> dict[str, Any]:
    args = {
        "num_bits": 4, "type": "float", "symmetric": True, "strategy": strategy, "group_size": group_size,
        "scale_dtype": scale_dtype,
    }  # fmt: skip
    # Weights unpacked at the first forward would be bf16 in a model of any dtype.
    return {"format": layout, "weights": args, "input_activations": None, "dequantize": True}
