"""Weights as ggml stores them, without rounding them again.

ggml cuts each row into blocks of 32 weights, with one fp16 scale a block:

- Q4_0: value = scale * (code - 8), codes of 4 bits.
- Q4_1: value = scale * code + minimum, the minimum in fp16 too.
- Q8_0: value = scale * code, codes of 8 signed bits.

A group of 64 or 128 columns becomes blocks that repeat its scale. The usual converters dequantize a packed
checkpoint and leave rounding to a second program, which moves the codes; here the codes stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize

from stages.core.lazy import torch
from stages.model.grid import Codes, Quantized

if TYPE_CHECKING:
    from torch import Tensor

PER_SCALE = 32
"""Weights that share a scale."""


class Unfit(ValueError):
    """ggml has no type that holds a weight as it is; the message says why."""


@dataclass(frozen=True)
class Stored:
    """A tensor as bytes of a ggml type."""

    kind: Kind
    data: np.ndarray[Any, Any]
    """Floats in their shape, or bytes `[out, bytes of a row]`, uint8."""
    rounding: float = 0.0
    """The largest error of a group's minimum, in units of the group's step; 0 is exact."""


def plain(tensor: Tensor) -> Stored:
    """Store floats: a matrix `[out, in]` as bf16, fp16 or fp32, whichever it has; a vector as fp32."""
    kinds = {torch.bfloat16: Kind.BF16, torch.float16: Kind.F16, torch.float32: Kind.F32}
    kind = kinds[tensor.dtype] if tensor.dim() > 1 else Kind.F32
    values = tensor.float().contiguous().numpy()
    return Stored(kind, quantize(values, kind) if kind is not Kind.F32 else values)


def packed(code: Quantized, order: Tensor | None = None) -> Stored:
    """Store a quantized weight `[out, in]` with its codes.

    Codes of 2 or 3 bits take 4: ggml's smaller types have other scales.

    Args:
        order: of the outputs, int64 `[out]`; None as they are.

    Raises:
        Unfit: ggml has no such grid.
    """
    if not isinstance(code, Codes):
        raise Unfit(f"{type(code).__name__} is no integer grid, which is all that GGUF's simple types hold")
    if order is not None:
        zero_point = None if code.zero_point is None else code.zero_point[order]
        code = replace(code, codes=code.codes[order], scale=code.scale[order], zero_point=zero_point)
    columns = code.codes.shape[1]
    group = code.group_size or columns
    if group % PER_SCALE:
        raise Unfit(f"groups of {group} columns do not split into blocks of {PER_SCALE}")
    if code.bits > 4 and (code.bits != 8 or code.zero_point is not None):
        asymmetric = "asymmetric " if code.zero_point is not None else ""
        raise Unfit(f"GGUF has no type for {asymmetric}codes of {code.bits} bits")
    scale = _half(code.scale, "scale").repeat_interleave(group // PER_SCALE, dim=1)
    codes = code.codes.unflatten(1, (-1, PER_SCALE))
    if code.bits == 8:
        return Stored(Kind.Q8_0, _rows(_bytes(scale), codes.view(torch.uint8)))
    # The signed code c is stored as c + 8.
    nibbles = (codes + 8).to(torch.uint8)
    halves = nibbles[..., : PER_SCALE // 2] | nibbles[..., PER_SCALE // 2 :] << 4
    if code.zero_point is None:
        return Stored(Kind.Q4_0, _rows(_bytes(scale), halves))
    low = -(code.zero_point.double() + 8) * code.scale.double()
    minimum = low.to(torch.float16)
    if not minimum.isfinite().all():
        raise Unfit("a minimum is beyond the range of fp16")
    steps = code.scale.double().clamp_min(torch.finfo(torch.float64).tiny)
    rounding = float(((minimum.double() - low).abs() / steps).max())
    minimum = minimum.repeat_interleave(group // PER_SCALE, dim=1)
    return Stored(Kind.Q4_1, _rows(_bytes(scale), _bytes(minimum), halves), rounding)


def _half(values: Tensor, what: str) -> Tensor:
    """Return `values` in fp16, which must hold them exactly."""
    half = values.to(torch.float16)
    if bad := int((half.double() != values.double()).sum()):
        raise Unfit(f"fp16 cannot hold {bad} of {values.numel()} {what}s")
    return half


def _bytes(halves: Tensor) -> Tensor:
    """Return fp16 `[out, blocks]` as bytes `[out, blocks, 2]`."""
    return halves.contiguous().view(torch.uint8).unflatten(1, (-1, 2))


def _rows(*parts: Tensor) -> np.ndarray[Any, Any]:
    """Join the bytes of blocks, each `[out, blocks, n]`, to rows of a ggml tensor."""
    return torch.cat(parts, dim=2).flatten(1).contiguous().numpy()
