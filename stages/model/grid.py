"""The integer grid of a quantized weight, and what anything on a grid has to answer.

A weight `[out, in]` is cut along its input into groups of `group_size` columns (one group a row when
`group_size` is null). A value is `(code - zero_point) * scale`, with one scale a group and a signed code
of `bits` bits in the range of compressed-tensors, [-2^(bits-1), 2^(bits-1) - 1].

- Symmetric: there is no zero point, and scale = max|w| / ((2^bits - 1) / 2).
- Asymmetric: the codes span the group from its smallest to its largest value, 0 always among them, and the
  zero point is a code. It costs `bits` more a group and pays where a group leans to one side.

Either way 0 is a point of the grid, so a pruned weight stays pruned. Scales are rounded to the dtype they
are stored in *before* anything is rounded to the grid, so that the codes are the best ones for the scales a
reader will find. Grids of other numbers are in `stages.model.floats`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from stages.core.errors import Refusal
from stages.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Quantized:
    """A weight `[out, in]` on a number grid, as it will be stored."""

    bits: int
    """Of one code."""

    def dequantize(self) -> Tensor:
        """`[out, in]` in the dtype of computation."""
        raise NotImplementedError

    def checked(self, weight: Tensor) -> Tensor:
        """Dequantized, in the dtype of the `weight` `[out, in]` it stands for.

        Raises:
            Refusal: nothing is left of the weight, or more than its dtype holds.
        """
        near = self.dequantize().to(weight.dtype)
        low, high = near.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise Refusal(
                f"rounded to {self.bits} bits, weights of up to {float(weight.abs().max()):.3g} leave the "
                f"range of {weight.dtype}; run in bfloat16 or float32, or list the matrix in ignore."
            )
        if low == high == 0 and weight.any():
            raise Refusal(
                f"its weights, {float(weight.abs().max()):.3g} at most, are out of reach of the grid's "
                "scales and would all be rounded to zero; list the matrix in ignore or take another method."
            )
        return near

    def requantize(self, weight: Tensor) -> Self:
        """`weight` `[out, in]` at the nearest points of this very grid: scales and zero points stay."""
        raise NotImplementedError

    def stored_bits(self) -> int:
        """Bits of the codes and of everything needed to read them (scales, zero points)."""
        raise NotImplementedError

    def nonzero(self) -> int:
        """Entries that dequantize to something else than zero."""
        return int(torch.count_nonzero(self.dequantize()))

    def scheme(self) -> dict[str, Any] | None:
        """How compressed-tensors names it; None: no format of it holds it, the weight is stored dense.

        `format`, and the arguments `weights` and `input_activations`; `dequantize` where transformers
        loads the format only when told to give plain weights. All of it goes through JSON.
        """
        return None

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the name compressed-tensors gives it in the module (`weight_packed`, ...)."""
        raise NotImplementedError

    @classmethod
    def read(cls, stored: Mapping[str, Tensor], name: str, scheme: Mapping[str, Any]) -> Self:
        """The inverse of `tensors` and `scheme`, for the parameter `name` (`<linear>.weight`) of a file."""
        raise NotImplementedError


@dataclass(frozen=True)
class Codes(Quantized):
    """Integer codes `[out, in]` int8, `scale` `[out, groups]` in the storage dtype.

    `zero_point` `[out, groups]` int8 is the code of 0 in a group; None is 0 everywhere (symmetric).
    """

    codes: Tensor
    scale: Tensor
    bits: int
    group_size: int | None
    zero_point: Tensor | None = None

    def dequantize(self) -> Tensor:
        """`[out, in]` in the scale's dtype: code less zero point times scale, rounded once."""
        return dequantize(self.codes, self.scale, self.group_size, self.zero_point)

    def requantize(self, weight: Tensor) -> Self:
        """`weight` `[out, in]` at the nearest codes of the same scales, clamped to their range."""
        low, high = bounds(self.bits)
        return replace(self, codes=self._unclamped(weight).clamp_(low, high).to(torch.int8))

    def inside(self, weight: Tensor) -> Tensor:
        """Where `weight` `[out, in]` is rounded without being clamped to the range, bool."""
        low, high = bounds(self.bits)
        codes = self._unclamped(weight)
        return (codes >= low) & (codes <= high)

    def _unclamped(self, weight: Tensor) -> Tensor:
        """Codes of any size, fp32, halves to even."""
        groups = weight.float().unflatten(1, (self.scale.shape[1], -1))
        codes = (groups / self.scale.float()[..., None]).round_()
        if self.zero_point is not None:
            codes += self.zero_point.float()[..., None]
        return codes.flatten(1)

    def stored_bits(self) -> int:
        """Codes, scales, and zero points of as many bits as a code."""
        zeros = 0 if self.zero_point is None else self.zero_point.numel() * self.bits
        return self.codes.numel() * self.bits + zeros + self.scale.numel() * self.scale.element_size() * 8

    def nonzero(self) -> int:
        """Codes that do not stand for zero."""
        if self.zero_point is None:
            return int(torch.count_nonzero(self.codes))
        return int((self.codes != _wide(self.zero_point, self.codes)).sum())

    def scheme(self) -> dict[str, Any]:
        """pack-quantized; transformers loads it packed only where it is symmetric."""
        args = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.zero_point is None,
            "strategy": "group" if self.group_size else "channel",
            "group_size": self.group_size,
        }
        told: dict[str, Any] = {"format": "pack-quantized", "weights": args, "input_activations": None}
        return told if self.zero_point is None else {**told, "dequantize": True}

    def tensors(self) -> dict[str, Tensor]:
        """Codes packed into int32 words, scales, zero points, and the shape, which padding hides."""
        from compressed_tensors.compressors.pack_quantized import pack_to_int32

        told = {
            "weight_packed": pack_to_int32(self.codes.cpu(), self.bits).contiguous(),
            "weight_scale": self.scale.cpu().contiguous(),
            "weight_shape": torch.tensor(self.codes.shape),
        }
        if self.zero_point is not None:
            packed = pack_to_int32(self.zero_point.cpu(), self.bits, packed_dim=0)
            told["weight_zero_point"] = packed.contiguous()
        return told

    @classmethod
    def read(cls, stored: Mapping[str, Tensor], name: str, scheme: Mapping[str, Any]) -> Self:
        """From a pack-quantized file."""
        from compressed_tensors.compressors.pack_quantized import unpack_from_int32

        args, scale = scheme["weights"], stored[f"{name}_scale"]
        bits, shape = args["num_bits"], torch.Size(stored[f"{name}_shape"].tolist())
        codes = unpack_from_int32(stored[f"{name}_packed"], bits, shape)
        zero = stored.get(f"{name}_zero_point")
        if zero is not None:
            # The library's packed_dim=0 fails on one row of 4-bit words, whose transpose keeps its strides.
            turned = zero.T.clone(memory_format=torch.contiguous_format)
            zero = unpack_from_int32(turned, bits, scale.T.shape).T
        return cls(codes, scale, bits, args["group_size"], zero)


@dataclass(frozen=True)
class Int8(Codes):
    """8-bit codes, one scale a row, of a linear whose inputs are rounded to 8 bits a token too (W8A8).

    The inputs are rounded when the model runs, with scales found then; plain transformers does it as well.
    """

    bits: int = 8
    group_size: None = None
    zero_point: None = None

    def scheme(self) -> dict[str, Any]:
        """int-quantized: one byte a code, nothing packed."""
        args = {"num_bits": 8, "type": "int", "symmetric": True}
        return {
            "format": "int-quantized",
            "weights": {**args, "strategy": "channel"},
            "input_activations": {**args, "strategy": "token", "dynamic": True},
        }

    def tensors(self) -> dict[str, Tensor]:
        """Codes and scales."""
        return {"weight": self.codes.cpu().contiguous(), "weight_scale": self.scale.cpu().contiguous()}

    @classmethod
    def read(cls, stored: Mapping[str, Tensor], name: str, scheme: Mapping[str, Any]) -> Self:
        """From an int-quantized file."""
        return cls(stored[name], stored[f"{name}_scale"])


@dataclass(frozen=True)
class Integers:
    """Codes of `bits` bits (2 to 8), one scale for every `group_size` input columns, None one a row."""

    bits: int
    group_size: int | None
    symmetric: bool = True

    def fit(self, group: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of each row of `group` `[rows, columns]`, `[rows, 1]` fp32.

        The scale is `stored` in `dtype`. Symmetric: no zero point.
        """
        if self.symmetric:
            return scale_of(group, self.bits, dtype), None
        low, high = bounds(self.bits)
        least = group.amin(1, keepdim=True).clamp(max=0)
        most = group.amax(1, keepdim=True).clamp(min=0)
        scale = stored((most - least) / (high - low), dtype)
        return scale, (low - least / scale).round().clamp(low, high)

    def round(self, values: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Nearest codes of `values`, fp32, halves to even, clamped; that of 0 is `zero_point`."""
        return round_to_codes(values, scale, self.bits, zero_point)

    def nearest(self, weight: Tensor) -> Codes:
        """`weight` `[out, in]` rounded to the nearest point of each group's grid, scales in its dtype."""
        groups = weight.float().reshape(-1, self.group_size or weight.shape[1])
        scale, zero = self.fit(groups, weight.dtype)
        codes = self.round(groups, scale, zero).view(weight.shape)
        rows = len(weight)
        zero = None if zero is None else zero.view(rows, -1)
        return self.made(codes, scale.view(rows, -1), zero, weight.dtype)

    def made(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Codes:
        """`Codes` from fp32 codes `[out, in]`, scales and zero points `[out, groups]`."""
        zero = None if zero_point is None else zero_point.to(torch.int8).contiguous()
        codes, scale = codes.to(torch.int8).contiguous(), scale.to(dtype).contiguous()
        return Codes(codes, scale, self.bits, self.group_size, zero)


def bounds(bits: int) -> tuple[int, int]:
    """Smallest and largest code."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def scale_of(group: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Symmetric scale of each row of `group` `[rows, columns]`, `[rows, 1]` fp32, `stored` in `dtype`."""
    return stored(group.abs().amax(1, keepdim=True) / ((2**bits - 1) / 2), dtype)


def round_to_codes(values: Tensor, scale: Tensor, bits: int, zero_point: Tensor | None = None) -> Tensor:
    """Nearest codes of `values`, fp32, halves to even, clamped to the range."""
    low, high = bounds(bits)
    codes = (values / scale).round_()
    if zero_point is not None:
        codes += zero_point
    return codes.clamp_(low, high)


def dequantize(
    codes: Tensor, scale: Tensor, group_size: int | None, zero_point: Tensor | None = None
) -> Tensor:
    """`[out, in]` in the scale's dtype from codes `[out, in]`, scales and zero points `[out, groups]`."""
    away = codes.float() if zero_point is None else codes.float() - _wide(zero_point, codes).float()
    return (away * _wide(scale, codes).float()).to(scale.dtype)


def _wide(by_group: Tensor, codes: Tensor) -> Tensor:
    """A value a group `[out, groups]` as a value a column `[out, in]`."""
    return by_group.repeat_interleave(codes.shape[1] // by_group.shape[1], 1)


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` rounded to `dtype`, fp32, never zero.

    One too small for the dtype becomes the least it holds; that of a group of zeros is 1, as any serves it.
    """
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    rounded = scale.to(dtype).float()
    return torch.where(rounded > 0, rounded, torch.where(scale > 0, least, 1.0))
