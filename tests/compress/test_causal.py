"""Causal attention of our own: no further from fp64 than torch's, which does all else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stages.compress import causal
from stages.compress.causal import by_queries, causal_attention
from stages.compress.statistics import ColumnNorm
from stages.compress.walk import walk
from tests import families


def drawn(heads: int, groups: int, tokens: int, size: int, *, batch: int = 2, seed: int = 0) -> list[Tensor]:
    """Query, key and value as models hand them over: `[batch, tokens, heads, size]`, two axes exchanged."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, tokens, number, size, generator=generator).bfloat16().transpose(1, 2)
        for number in (heads, groups, groups)
    ]


def in_fp64(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """The formula, head by head."""
    q, k, v = (one.double() for one in (query, key, value))
    shared = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // shared].mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        future = torch.ones(q.shape[2], q.shape[2]).triu(1).bool()
        out[:, head] = scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, head // shared]
    return out


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 150), st.sampled_from([8, 20, 64]),
    st.integers(0, 99), st.sampled_from([None, 0.3]), st.sampled_from([1, 2**12, causal.ENTRIES]),
)  # fmt: skip
def test_it_is_the_formula_no_further_off_than_torchs(groups, shared, tokens, size, seed, scale, entries):
    q, k, v = drawn(groups * shared, groups, tokens, size, seed=seed)
    wanted = in_fp64(q, k, v, scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal, "ENTRIES", entries)  # from the fewest queries at a time to all
        made = causal_attention(q, k, v, scale)
    torchs = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    def off(found: Tensor) -> float:
        return float((found.double() - wanted).square().mean().sqrt())

    assert made.shape == torchs.shape and made.dtype == torch.bfloat16
    assert off(made) <= 1.1 * off(torchs) + 1e-9


def test_values_may_be_of_another_size():
    q, k, _ = drawn(4, 4, 40, 16)
    _, _, v = drawn(4, 4, 40, 24)
    torch.testing.assert_close(causal_attention(q, k, v).double(), in_fp64(q, k, v), atol=0.02, rtol=0.02)


def test_it_stands_in_where_it_computes_the_same_however_it_is_called():
    q, k, v = drawn(6, 2, 70, 16)
    ours = causal_attention(q, k, v)
    with torch.no_grad(), by_queries():
        assert torch.equal(scaled_dot_product_attention(q, k, v, None, 0.0, True, enable_gqa=True), ours)
        made = scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True, enable_gqa=True)
        assert torch.equal(made, ours)
        made = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
        assert torch.equal(made, causal_attention(q, k, v, 0.3))
    assert not torch.equal(scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), ours)


MASK = torch.ones(70, 70).tril().bool()


@pytest.mark.parametrize(
    "asked",
    [
        {"is_causal": False}, {"attn_mask": MASK}, {"dtype": torch.float32}, {"dtype": torch.float16},
        {"grad": True}, {"key_tokens": 40},
    ],
    ids=str,
)  # fmt: skip
def test_torch_computes_all_else(asked, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("not what is served")

    monkeypatch.setattr(causal, "causal_attention", never)
    q, k, v = (one.to(asked.get("dtype", torch.bfloat16)) for one in drawn(4, 4, 70, 16))
    k, v = (one[:, :, : asked.get("key_tokens", 70)] for one in (k, v))
    given = {"is_causal": "attn_mask" not in asked} | {
        key: asked[key] for key in ("is_causal", "attn_mask") if key in asked
    }
    with torch.set_grad_enabled("grad" in asked):
        wanted = scaled_dot_product_attention(q, k, v, **given)
        with by_queries():
            assert torch.equal(scaled_dot_product_attention(q, k, v, **given), wanted)


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 8, 16), (1, 4, 8, 16), (1, 4, 8, 16)), ((2, 4, 8, 16), (2, 4, 8, 16), (2, 1, 8, 16)),
        ((2, 4, 8, 16), (2, 2, 8, 16), (2, 2, 8, 16)), ((0, 4, 8, 16), (0, 4, 8, 16), (0, 4, 8, 16)),
    ],
    ids=["windows", "values", "no groups asked for", "nothing"],
)  # fmt: skip
def test_what_torch_broadcasts_or_refuses_is_left_to_it(shapes, monkeypatch):
    monkeypatch.setattr(causal, "causal_attention", lambda *_: pytest.fail("not what is served"))
    made = [torch.ones(shape, dtype=torch.bfloat16) for shape in shapes]

    def outcome() -> object:
        try:
            return list(scaled_dot_product_attention(*made, is_causal=True).shape)
        except RuntimeError as error:
            return str(error)

    with torch.no_grad():
        wanted = outcome()
        with by_queries():
            assert outcome() == wanted


def test_a_scale_of_nothing_is_torchs():
    q, k, v = drawn(4, 4, 40, 16)
    with torch.no_grad():
        wanted = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.0)
        with by_queries():
            made = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.0)
    torch.testing.assert_close(made, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("sequential", ["linear", "block", "none"])
def test_a_walk_has_it_in_forwards_alone(sequential, monkeypatch):
    seen = {"forward": 0, "compress": 0}
    ours = causal.causal_attention

    def attend(*given):
        seen["forward"] += 1
        return ours(*given)

    def compress(linear, statistic):
        seen["compress"] += 1
        assert not torch.overrides._get_current_function_mode()

    monkeypatch.setattr(causal, "causal_attention", attend)
    model = families.model("llama").bfloat16()
    windows = torch.arange(64).view(2, 32)
    walk(model, compress, windows=windows, statistic=ColumnNorm, sequential=sequential, batch_size=1)
    assert not torch.overrides._get_current_function_mode()
    # Every block's every time: the second block's comes after the first's linears.
    assert seen["forward"] >= 2 * 2 and seen["compress"] == 7 * 2
