"""Causal attention in bfloat16 on a CPU, a few queries at a time.

Without matrix units in the CPU, torch computes it by general loops. What it costs is mostly two products,
q kT and p v, which CPUs with bf16 instructions have fast code for. Here they are taken for as many queries at
once as keep their probabilities in a cache, each only with the keys up to the last of them. Products of two
bf16 values are exact and summed in fp32, the softmax is fp32, and probabilities are rounded to bf16 for the
second product, as torch does. `python -m benchmarks.compression` prints `attention.times_faster`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

from stages.compress.statistics import exact_products
from stages.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

ENTRIES = 2**20
"""Probabilities held at a time, over all heads and windows."""
FEWEST = 32
"""Queries at a time, however many heads and keys there are."""


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale * q kT) v, where a token attends to itself and those before.

    Args:
        query: `[batch, heads, tokens, size]` bf16.
        key: `[batch, groups, tokens, size]` bf16, each for `heads / groups` consecutive heads.
        value: the same, of any size.
        scale: None is 1 / sqrt(size).

    Returns:
        `[batch, heads, tokens, size of value]` bf16.
    """
    batch, heads, tokens, size = query.shape
    groups = key.shape[1]
    q = query.reshape(batch * groups, heads // groups, tokens, size).float()
    k = key.reshape(batch * groups, tokens, size).float().mT
    v = value.reshape(batch * groups, tokens, -1).float()
    out = query.new_empty(*q.shape[:3], v.shape[-1])
    step = max(FEWEST, ENTRIES // (batch * heads * tokens))
    with exact_products(query.dtype):
        for start in range(0, tokens, step):
            now = q[:, :, start : start + step]
            stop = start + now.shape[2]
            scores = torch.baddbmm(
                q.new_zeros(1),
                now.flatten(1, 2),
                k[..., :stop],
                beta=0,
                alpha=size**-0.5 if scale is None else scale,
            ).view(*now.shape[:3], stop)
            later = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1)
            scores[..., start:].masked_fill_(later, -torch.inf)
            made = torch.bmm(scores.softmax(-1).flatten(1, 2), v[:, :stop])
            out[:, :, start:stop] = made.view(*now.shape[:3], -1)
    return out.view(batch, heads, tokens, -1)


@contextmanager
def by_queries() -> Iterator[None]:
    """Use `causal_attention` in place of torch's attention wherever it computes the same.

    The results differ by rounding; scores beyond fp32 are NaN here, which whoever reads the output refuses.
    """
    functional = torch.nn.functional
    torchs = functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _serves(query, key, value, *args, **kwargs):
            return causal_attention(query, key, value, kwargs.get("scale"))
        return torchs(query, key, value, *args, **kwargs)

    with mock.patch.object(functional, "scaled_dot_product_attention", attention):
        yield


def _serves(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether `causal_attention` computes what torch is asked for, and no gradient is."""
    plain = is_causal and attn_mask is None and not dropout_p and not torch.is_grad_enabled()
    if not plain or scale == 0 or query.ndim != 4 or not query.numel():
        return False
    alike = key.shape[:3] == value.shape[:3] and all(query.shape[i] == key.shape[i] for i in (0, 2, 3))
    shared = query.shape[1] % key.shape[1] == 0 if enable_gqa else query.shape[1] == key.shape[1]
    kinds = {(one.device.type, one.dtype) for one in (query, key, value)}
    return alike and shared and kinds == {("cpu", torch.bfloat16)}
