"""Products of bf16 and fp16 values on a processor that has no instructions for them.

Without AVX-512, which many laptops lack, torch multiplies bf16 matrices several times as slowly as fp32 ones.
Two bf16 values have a product that is exact in fp32. So the matrices are widened to fp32, multiplied there
with sums in fp32, and the result is rounded once, as hardware with such instructions does. Values kept in
memory stay bf16, and so do gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from stages.core.lazy import torch

_NATIVE = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}
"""By dtype, the operator that tells whether oneDNN multiplies it with this processor's instructions."""
HALVES = list(_NATIVE)
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
"""torch's operators for matrix products. `linear`, `matmul` and the gradients of all of them end in these."""
_SLICE = 2**20
"""Values widened at a time, 4 MiB in fp32. The system takes a larger block of memory back after each product
and clears it before the next, which takes longer than many products."""
_widened: set[torch.dtype] = set()
_library: list[torch.library.Library] = []
"""Holds the kernels that replace torch's: they go when it does."""


def slow() -> list[str]:
    """Return which of bfloat16 and float16 this processor has no instructions for."""
    asked = {dtype: getattr(torch.ops.mkldnn, name, None) for dtype, name in _NATIVE.items()}
    return [dtype for dtype, native in asked.items() if native is None or not native()]


def widen(names: Iterable[str]) -> None:
    """From now on, multiply matrices of these dtypes, such as `bfloat16`, in fp32 on the CPU."""
    _widened.update(getattr(torch, name) for name in names)
    if not _widened or _library:
        return
    _library.append(torch.library.Library("aten", "IMPL"))
    for name in _PRODUCTS:
        kernel = _in_fp32(torch.library.get_kernel(f"aten::{name}", "CPU"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch says that a kernel is replaced
            _library[0].impl(name, kernel, "CPU", with_keyset=True, allow_override=True)


def _in_fp32(kernel: Any) -> Callable[..., torch.Tensor]:
    def product(keys: Any, *given: torch.Tensor, **scales: Any) -> torch.Tensor:
        *added, left, right = given
        if left.dtype not in _widened:
            return kernel.call_boxed(keys, *given, **scales)
        wide = [each.float() for each in (*added, left)]
        if right.dim() == 2 and right.numel() > _SLICE and right.stride(0) == 1:
            return _by_columns(lambda *parts: kernel.call_boxed(keys, *parts, **scales), wide, right)
        return kernel.call_boxed(keys, *wide, right.float(), **scales).to(left.dtype)

    return product


def _by_columns(
    product: Callable[..., torch.Tensor], wide: Sequence[torch.Tensor], right: torch.Tensor
) -> torch.Tensor:
    """Return a product whose right matrix, such as that of all tokens, is widened a slice at a time.

    Args:
        product: of fp32 matrices.
        wide: what comes before `right`: the left matrix `[m, k]`, and before it what is added.
        right: `[k, n]`, the transpose of a matrix whose rows lie one after another.
    """
    *added, left = wide
    result = right.new_empty(len(left), right.shape[1])
    columns = max(1, _SLICE // len(right))
    for begin in range(0, right.shape[1], columns):
        part = slice(begin, begin + columns)
        terms = [each.expand_as(result)[:, part] for each in added]
        result[:, part] = product(*terms, left, right[:, part].float())
    return result
