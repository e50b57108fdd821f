"""Our causal attention: as close to fp64 as bf16 allows, and used wherever it computes the same."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from stages.compress import causal
from stages.compress.causal import by_queries, causal_attention
from stages.compress.statistics import ColumnNorm
from stages.compress.walk import walk
from tests import families

pytestmark = pytest.mark.numerics


def drawn(heads: int, groups: int, tokens: int, size: int, *, batch: int = 2, seed: int = 0) -> list[Tensor]:
    """Draw query, key and value as models pass them: `[batch, tokens, heads, size]` with two axes swapped."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, tokens, number, size, generator=generator).bfloat16().transpose(1, 2)
        for number in (heads, groups, groups)
    ]


def in_fp64(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Compute the formula head by head."""
    q, k, v = (tensor.double() for tensor in (query, key, value))
    shared = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // shared].mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        future = torch.ones(q.shape[2], q.shape[2]).triu(1).bool()
        out[:, head] = scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, head // shared]
    return out


def within_rounding(attended: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> bool:
    """Return whether fp64 is no further away than two roundings to bf16, of probabilities and of the output.

    Only CPUs with matrix units round the probabilities. A twentieth is left for fp32 sums.
    """
    exact, size = in_fp64(q, k, v, scale), in_fp64(q, k, v.abs(), scale)
    return bool(((attended.double() - exact).abs() <= 1.05 * 2**-8 * (size + exact.abs())).all())


def on_matrix_units(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Round the operands of a product to bf16, as such CPUs do and others need not."""
    return lambda *operands, **options: product(*(t.bfloat16().float() for t in operands), **options)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 150), st.sampled_from([8, 20, 64]),
    st.integers(0, 99), st.sampled_from([None, 0.3]),
    st.sampled_from([1, 2**12, causal.CACHED_PROBABILITIES]), st.booleans(),
)  # fmt: skip
def test_it_rounds_the_formula_no_more_than_probabilities_and_output(
    groups, shared, tokens, size, seed, scale, cached, matrix_units
):
    q, k, v = drawn(groups * shared, groups, tokens, size, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal, "CACHED_PROBABILITIES", cached)  # from the fewest queries at a time to all
        for name in ("bmm", "baddbmm") if matrix_units else ():
            patch.setattr(torch, name, on_matrix_units(getattr(torch, name)))
        attended = causal_attention(q, k, v, scale)
    assert attended.shape == q.shape and attended.dtype == torch.bfloat16
    assert within_rounding(attended, q, k, v, scale)


def test_values_may_be_of_another_size():
    q, k, _ = drawn(4, 4, 40, 16)
    _, _, v = drawn(4, 4, 40, 24)
    assert within_rounding(causal_attention(q, k, v), q, k, v)


def test_rounding_the_scores_too_would_be_noticed():
    q, k, v = drawn(4, 4, 40, 16)
    scores = (q.double() @ k.double().mT / 4).bfloat16().double()
    attended = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).softmax(-1) @ v.double()
    assert not within_rounding(attended.bfloat16(), q, k, v)


def test_it_replaces_torchs_however_that_is_called():
    q, k, v = drawn(6, 2, 70, 16)
    ours = causal_attention(q, k, v)
    with torch.no_grad(), by_queries():
        assert torch.equal(
            functional.scaled_dot_product_attention(q, k, v, None, 0.0, True, enable_gqa=True), ours
        )
        attended = functional.scaled_dot_product_attention(
            query=q, key=k, value=v, is_causal=True, enable_gqa=True
        )
        assert torch.equal(attended, ours)
        attended = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=0.3, enable_gqa=True
        )
        assert torch.equal(attended, causal_attention(q, k, v, 0.3))
    assert not torch.equal(
        functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), ours
    )


MASK = torch.ones(70, 70).tril().bool()


@pytest.mark.parametrize(
    "case",
    [
        {"is_causal": False}, {"attn_mask": MASK}, {"dtype": torch.float32}, {"dtype": torch.float16},
        {"grad": True}, {"key_tokens": 40},
    ],
    ids=str,
)  # fmt: skip
def test_torch_computes_everything_else(case, monkeypatch):
    monkeypatch.setattr(causal, "causal_attention", lambda *_: pytest.fail("ours does not serve this"))
    q, k, v = (tensor.to(case.get("dtype", torch.bfloat16)) for tensor in drawn(4, 4, 70, 16))
    k, v = (tensor[:, :, : case.get("key_tokens", 70)] for tensor in (k, v))
    options = {"is_causal": "attn_mask" not in case} | {
        key: case[key] for key in ("is_causal", "attn_mask") if key in case
    }
    with torch.set_grad_enabled("grad" in case):
        torchs = functional.scaled_dot_product_attention(q, k, v, **options)
        with by_queries():
            assert torch.equal(functional.scaled_dot_product_attention(q, k, v, **options), torchs)


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 8, 16), (1, 4, 8, 16), (1, 4, 8, 16)), ((2, 4, 8, 16), (2, 4, 8, 16), (2, 1, 8, 16)),
        ((2, 4, 8, 16), (2, 2, 8, 16), (2, 2, 8, 16)), ((0, 4, 8, 16), (0, 4, 8, 16), (0, 4, 8, 16)),
    ],
    ids=["windows", "values", "no groups enabled", "empty"],
)  # fmt: skip
def test_shapes_that_torch_broadcasts_or_refuses_are_left_to_it(shapes, monkeypatch):
    monkeypatch.setattr(causal, "causal_attention", lambda *_: pytest.fail("ours does not serve this"))
    tensors = [torch.ones(shape, dtype=torch.bfloat16) for shape in shapes]

    def outcome() -> object:
        try:
            return list(functional.scaled_dot_product_attention(*tensors, is_causal=True).shape)
        except RuntimeError as error:
            return str(error)

    with torch.no_grad():
        torchs = outcome()
        with by_queries():
            assert outcome() == torchs


def test_a_scale_of_zero_is_left_to_torch():
    q, k, v = drawn(4, 4, 40, 16)
    with torch.no_grad():
        torchs = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.0)
        with by_queries():
            attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.0)
    torch.testing.assert_close(attended, torchs, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the calls of our attention, of torch's, and those outside a forward."""
    counts: Counter[str] = Counter()

    def count(name: str, attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*args: Any, **kwargs: Any) -> Tensor:
            counts[name] += 1
            return attention(*args, **kwargs)

        return counted

    torchs = count("torch", functional.scaled_dot_product_attention)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", torchs)
    monkeypatch.setattr(causal, "causal_attention", count("ours", causal.causal_attention))
    return counts


def walk_over(family: str, sequential: str, tokens: int) -> None:
    """Walk over two blocks in bf16 with two windows, one at a time, and change nothing."""
    ids = torch.arange(2 * tokens).view(2, tokens)
    attention = functional.scaled_dot_product_attention

    def compress(linear, statistic):
        if sequential != "linear":  # which compresses in the middle of a forward
            assert functional.scaled_dot_product_attention is attention

    model = families.model(family)
    walk(model, compress, windows=ids, statistic=ColumnNorm, sequential=sequential, batch_size=1)
    assert functional.scaled_dot_product_attention is attention


FORWARDS = {"linear": 2, "block": 4, "none": 2}
"""Calls of a block for two windows: one window and then both; each window twice; each window once."""


@pytest.mark.parametrize("family", families.CONFIGS)
@pytest.mark.parametrize("sequential", FORWARDS)
def test_a_walk_computes_the_models_own_attention_by_ours(sequential, family, calls):
    """Windows are shorter than gemma3's sliding window, so every family's attention is plainly causal."""
    walk_over(family, sequential, tokens=12)
    assert calls == {"ours": 2 * FORWARDS[sequential]}


def test_attention_with_a_sliding_window_is_left_to_torch(calls):
    walk_over("gemma3", "none", tokens=32)
    assert calls == {"torch": 2 * FORWARDS["none"]}


def test_attention_is_torchs_outside_a_walk(calls):
    with torch.no_grad():
        families.model("llama")(input_ids=torch.arange(24).view(2, 12))
    assert calls == {"torch": 2}
