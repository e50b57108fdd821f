"""Weights on a number grid, and the integer grid.

A weight `[out, in]` is cut along its input into groups of `group_size` columns (one group per row when
`group_size` is null). A value is `(code - zero_point) * scale`, with one scale per group and a signed code of
`bits` bits in the range of compressed-tensors, [-2^(bits-1), 2^(bits-1) - 1].

- Symmetric: there is no zero point, and scale = max|w| / ((2^bits - 1) / 2).
- Asymmetric: the codes span the group from its smallest to its largest value, always including 0, and the
  zero point is a code. It costs `bits` more per group and pays off where a group leans to one side.

In both cases 0 is a point of the grid, so a pruned weight stays pruned. Scales are rounded to the dtype they
are stored in *before* weights are rounded to the grid, so the codes are the best ones for the scales in the
file. Floating-point grids are in `stages.model.floats`.
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
    """Bits of one code."""

    def dequantize(self) -> Tensor:
        """Return the weight as `[out, in]` floats."""
        raise NotImplementedError

    def checked(self, weight: Tensor) -> Tensor:
        """Return the dequantized weight in the dtype of the original `weight`, `[out, in]`.

        Raises:
            Refusal: it leaves the range of that dtype, or all of it is rounded to zero.
        """
        rounded = self.dequantize().to(weight.dtype)
        low, high = rounded.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise Refusal(
                f"rounded to {self.bits} bits, weights of up to {float(weight.abs().max()):.3g} leave the "
                f"range of {weight.dtype}; run in bfloat16 or float32, or list the matrix in ignore."
            )
        if low == high == 0 and weight.any():
            raise Refusal(
                f"its weights, {float(weight.abs().max()):.3g} at most, are too small for the grid's scales "
                "and would all be rounded to zero; list the matrix in ignore or use another method."
            )
        return rounded

    def requantize(self, weight: Tensor) -> Self:
        """Round `weight`, `[out, in]`, to the nearest points of this grid, keeping scales and zero points."""
        raise NotImplementedError

    def stored_bits(self) -> int:
        """Count the bits of the codes and of everything needed to read them (scales, zero points)."""
        raise NotImplementedError

    def nonzero(self) -> int:
        """Count the entries that do not dequantize to zero."""
        return int(torch.count_nonzero(self.dequantize()))

    def equals(self, other: Quantized) -> bool:
        """Tell whether `other`, on the same device, has the same codes, scales and zero points."""
        mine, theirs = vars(self), vars(other)
        return mine.keys() == theirs.keys() and all(
            _same(value, theirs[name]) for name, value in mine.items()
        )

    def scheme(self) -> dict[str, Any] | None:
        """Return its format in compressed-tensors, or None if the library has none and it is stored dense.

        Keys are `format`, the arguments `weights` and `input_activations`, and `dequantize` where
        transformers loads the format only with that option. Values survive JSON.
        """
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors, by their names in compressed-tensors (`weight_packed`, ...)."""
        raise NotImplementedError

    @classmethod
    def read(cls, stored: Mapping[str, Tensor], name: str, scheme: Mapping[str, Any]) -> Self:
        """Read the parameter `name` (`<linear>.weight`) from a file's tensors: the inverse of `tensors`."""
        raise NotImplementedError


def _same(value: Any, other: Any) -> bool:
    if not (isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor)):
        return bool(value is other or value == other)
    if value.element_size() == other.element_size() == 1:  # torch compares no fp8
        value, other = value.view(torch.uint8), other.view(torch.uint8)
    return torch.equal(value, other)


@dataclass(frozen=True)
class Codes(Quantized):
    """A weight on the integer grid."""

    codes: Tensor
    """`[out, in]` int8."""
    scale: Tensor
    """`[out, groups]` in the dtype it is stored in."""
    bits: int
    group_size: int | None
    zero_point: Tensor | None = None
    """The code of 0 in each group, `[out, groups]` int8; None is 0 everywhere (symmetric)."""

    def dequantize(self) -> Tensor:
        """Return (code - zero point) * scale, `[out, in]` in the scale's dtype, rounded once."""
        return dequantize(self.codes, self.scale, self.group_size, self.zero_point)

    def requantize(self, weight: Tensor) -> Self:
        """Round `weight`, `[out, in]`, to the nearest codes for the same scales, clamped to their range."""
        low, high = bounds(self.bits)
        return replace(self, codes=self._unclamped(weight).clamp_(low, high).to(torch.int8))

    def inside(self, weight: Tensor) -> Tensor:
        """Return where `weight`, `[out, in]`, is rounded without clamping, bool."""
        low, high = bounds(self.bits)
        codes = self._unclamped(weight)
        return (codes >= low) & (codes <= high)

    def _unclamped(self, weight: Tensor) -> Tensor:
        """Return the nearest codes, fp32, ties to even, not clamped to the range."""
        groups = weight.float().unflatten(1, (self.scale.shape[1], -1))
        codes = (groups / self.scale.float()[..., None]).round_()
        if self.zero_point is not None:
            codes += self.zero_point.float()[..., None]
        return codes.flatten(1)

    def stored_bits(self) -> int:
        """Count codes, scales, and zero points, which have as many bits as a code."""
        zeros = 0 if self.zero_point is None else self.zero_point.numel() * self.bits
        return self.codes.numel() * self.bits + zeros + self.scale.numel() * self.scale.element_size() * 8

    def nonzero(self) -> int:
        """Count the codes that do not stand for zero."""
        if self.zero_point is None:
            return int(torch.count_nonzero(self.codes))
        return int((self.codes != _by_column(self.zero_point, self.codes)).sum())

    def scheme(self) -> dict[str, Any]:
        """Return pack-quantized; transformers loads it packed only if it is symmetric."""
        args = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.zero_point is None,
            "strategy": "group" if self.group_size else "channel",
            "group_size": self.group_size,
        }
        scheme: dict[str, Any] = {"format": "pack-quantized", "weights": args, "input_activations": None}
        return scheme if self.zero_point is None else {**scheme, "dequantize": True}

    def tensors(self) -> dict[str, Tensor]:
        """Return codes packed into int32 words, scales, zero points, and the shape, which padding hides."""
        from compressed_tensors.compressors.pack_quantized import pack_to_int32

        tensors = {
            "weight_packed": pack_to_int32(self.codes.cpu(), self.bits).contiguous(),
            "weight_scale": self.scale.cpu().contiguous(),
            "weight_shape": torch.tensor(self.codes.shape),
        }
        if self.zero_point is not None:
            packed = pack_to_int32(self.zero_point.cpu(), self.bits, packed_dim=0)
            tensors["weight_zero_point"] = packed.contiguous()
        return tensors

    @classmethod
    def read(cls, stored: Mapping[str, Tensor], name: str, scheme: Mapping[str, Any]) -> Self:
        """Read from a pack-quantized file."""
        from compressed_tensors.compressors.pack_quantized import unpack_from_int32

        args, scale = scheme["weights"], stored[f"{name}_scale"]
        bits, shape = args["num_bits"], torch.Size(stored[f"{name}_shape"].tolist())
        codes = unpack_from_int32(stored[f"{name}_packed"], bits, shape)
        zero = stored.get(f"{name}_zero_point")
        if zero is not None:
            # The library's packed_dim=0 fails on one row of 4-bit words, whose transpose keeps its strides.
            transposed = zero.T.clone(memory_format=torch.contiguous_format)
            zero = unpack_from_int32(transposed, bits, scale.T.shape).T
        return cls(codes, scale, bits, args["group_size"], zero)


@dataclass(frozen=True)
class Int8(Codes):
    """8-bit codes, one scale per row, of a linear whose inputs are rounded to 8 bits as well (W8A8).

    The inputs are rounded when the model runs, with one scale per token; plain transformers does that too.
    """

    bits: int = 8
    group_size: None = None
    zero_point: None = None

    def scheme(self) -> dict[str, Any]:
        """Return int-quantized: one byte per code, nothing packed."""
        args = {"num_bits": 8, "type": "int", "symmetric": True}
        return {
            "format": "int-quantized",
            "weights": {**args, "strategy": "channel"},
            "input_activations": {**args, "strategy": "token", "dynamic": True},
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return codes and scales."""
        return {"weight": self.codes.cpu().contiguous(), "weight_scale": self.scale.cpu().contiguous()}

    @classmethod
    def read(cls, stored: Mapping[str, Tensor], name: str, scheme: Mapping[str, Any]) -> Self:
        """Read from an int-quantized file."""
        return cls(stored[name], stored[f"{name}_scale"])


@dataclass(frozen=True)
class Integers:
    """The settings of an integer grid."""

    bits: int
    """Bits of a code, 2 to 8."""
    group_size: int | None
    """Input columns per scale; None is one scale per row."""
    symmetric: bool = True
    """Whether there are no zero points."""

    def fit(self, group: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Fit scale and zero point to each row of `group`, `[rows, columns]`.

        Returns:
            The scale, `[rows, 1]` fp32, rounded to `dtype`; the zero point, `[rows, 1]` fp32, None if
            symmetric.
        """
        if self.symmetric:
            return scale_of(group, self.bits, dtype), None
        low, high = bounds(self.bits)
        least = group.amin(1, keepdim=True).clamp(max=0)
        most = group.amax(1, keepdim=True).clamp(min=0)
        scale = round_scale(divided(most - least, high - low), dtype)
        return scale, (low - least / scale).round().clamp(low, high)

    def round(self, values: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return the nearest codes of `values`, fp32, ties to even, clamped; 0 has the code `zero_point`."""
        return round_to_codes(values, scale, self.bits, zero_point)

    def nearest(self, weight: Tensor) -> Codes:
        """Round `weight`, `[out, in]`, to the nearest point of each group's grid, scales in its dtype."""
        groups = weight.float().reshape(-1, self.group_size or weight.shape[1])
        scale, zero = self.fit(groups, weight.dtype)
        codes = self.round(groups, scale, zero).view(weight.shape)
        rows = len(weight)
        zero = None if zero is None else zero.view(rows, -1)
        return self.to_codes(codes, scale.view(rows, -1), zero, weight.dtype)

    def to_codes(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Codes:
        """Convert fp32 codes `[out, in]`, scales and zero points `[out, groups]` to their stored dtypes."""
        zero = None if zero_point is None else zero_point.to(torch.int8).contiguous()
        codes, scale = codes.to(torch.int8).contiguous(), scale.to(dtype).contiguous()
        return Codes(codes, scale, self.bits, self.group_size, zero)


def bounds(bits: int) -> tuple[int, int]:
    """Return the smallest and the largest code."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def scale_of(group: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the symmetric scale of each row of `group`, `[rows, columns]`: `[rows, 1]` fp32, of `dtype`."""
    return round_scale(divided(group.abs().amax(1, keepdim=True), (2**bits - 1) / 2), dtype)


def round_to_codes(values: Tensor, scale: Tensor, bits: int, zero_point: Tensor | None = None) -> Tensor:
    """Return the nearest codes of `values`, fp32, ties to even, clamped to the range."""
    low, high = bounds(bits)
    codes = (values / scale).round_()
    if zero_point is not None:
        codes += zero_point
    return codes.clamp_(low, high)


def dequantize(
    codes: Tensor, scale: Tensor, group_size: int | None, zero_point: Tensor | None = None
) -> Tensor:
    """Turn codes `[out, in]`, scales and zero points `[out, groups]` into numbers of the scale's dtype."""
    steps = codes.float() if zero_point is None else codes.float() - _by_column(zero_point, codes).float()
    return (steps * _by_column(scale, codes).float()).to(scale.dtype)


def _by_column(by_group: Tensor, codes: Tensor) -> Tensor:
    """Repeat a value per group, `[out, groups]`, for every column, `[out, in]`."""
    return by_group.repeat_interleave(codes.shape[1] // by_group.shape[1], 1)


def divided(values: Tensor, number: float) -> Tensor:
    """Divide `values`, fp32, by `number`, rounded to nearest on every device.

    CUDA multiplies by the reciprocal of a Python number, which rounds twice; by a tensor it divides.
    """
    return values / values.new_full((), number)


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round `scale` to `dtype`, as fp32, never to zero.

    A scale that `dtype` would round to zero becomes its smallest number. The scale of an all-zero group is 1.
    """
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    rounded = scale.to(dtype).float()
    return torch.where(rounded > 0, rounded, torch.where(scale > 0, least, 1.0))
