"""Causal attention in bfloat16 on a CPU, a few queries at a time.

On a CPU without matrix units torch computes it by general loops. Most of its cost is two products, q kT and p
v, for which CPUs with bf16 instructions have fast code. Here both are computed for as many queries at once as
keep their probabilities in cache, each only with the keys up to the last of those queries. Products of bf16
values are exact and summed in fp32, the softmax is fp32, and probabilities are rounded to bf16 for the second
product, as torch does. `python -m benchmarks.compression` prints the speedup as `attention.times_faster`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from stages.compress.statistics import exact_products
from stages.core.lazy import mock, torch

if TYPE_CHECKING:
    from torch import Tensor

CACHED_PROBABILITIES = 2**20
"""Probabilities computed at a time, over all heads and windows."""
MIN_QUERIES = 32
"""Queries computed at a time, however many heads and keys there are."""


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Compute softmax(scale * q kT) v, where a token attends to itself and to earlier tokens.

    Args:
        query: `[batch, heads, tokens, size]` bf16.
        key: `[batch, groups, tokens, size]` bf16, each for `heads / groups` consecutive heads.
        value: shaped as `key`, its last size may differ.
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
    step = max(MIN_QUERIES, CACHED_PROBABILITIES // (batch * heads * tokens))
    with exact_products(query.dtype):
        for start in range(0, tokens, step):
            queries = q[:, :, start : start + step]
            stop = start + queries.shape[2]
            scores = torch.baddbmm(
                q.new_zeros(1),
                queries.flatten(1, 2),
                k[..., :stop],
                beta=0,
                alpha=size**-0.5 if scale is None else scale,
            ).view(*queries.shape[:3], stop)
            later = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1)
            scores[..., start:].masked_fill_(later, -torch.inf)
            attended = torch.bmm(scores.softmax(-1).flatten(1, 2), v[:, :stop])
            out[:, :, start:stop] = attended.view(*queries.shape[:3], -1)
    return out.view(batch, heads, tokens, -1)


@contextmanager
def by_queries() -> Iterator[None]:
    """Replace torch's attention by `causal_attention` wherever both compute the same.

    The results differ by rounding. Scores that overflow fp32 give NaN here, which later checks refuse.
    """
    functional = torch.nn.functional
    original = functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _applies(query, key, value, *args, **kwargs):
            return causal_attention(query, key, value, kwargs.get("scale"))
        return original(query, key, value, *args, **kwargs)

    with mock.patch.object(functional, "scaled_dot_product_attention", attention):
        yield


def _applies(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Tell whether `causal_attention` computes this call of torch's attention, without gradients."""
    plain = is_causal and attn_mask is None and not dropout_p and not torch.is_grad_enabled()
    if not plain or scale == 0 or query.ndim != 4 or not query.numel():
        return False
    shapes = key.shape[:3] == value.shape[:3] and all(query.shape[i] == key.shape[i] for i in (0, 2, 3))
    heads = query.shape[1] % key.shape[1] == 0 if enable_gqa else query.shape[1] == key.shape[1]
    kinds = {(tensor.device.type, tensor.dtype) for tensor in (query, key, value)}
    return shapes and heads and kinds == {("cpu", torch.bfloat16)}
