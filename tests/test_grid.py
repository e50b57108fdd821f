"""The integer grid: zero is exact, codes stay in range, and a round trip loses at most half a step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.core.grid import Codes, bounds, dequantize, round_to_codes, scale_of

BITS = st.integers(2, 8)
SEED = st.integers(0, 2**31)


def draw(seed: int, rows: int = 4, columns: int = 16) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(BITS, SEED)
def test_codes_are_in_range_and_half_a_step_away(bits, seed):
    values = draw(seed)
    scale = scale_of(values, bits, torch.float32)
    codes = round_to_codes(values, scale, bits)
    low, high = bounds(bits)
    assert codes.min() >= low and codes.max() <= high
    assert torch.equal(codes, codes.round())
    # The largest positive value may be clamped by half a step more than rounding loses.
    assert ((codes * scale - values).abs() <= scale * 0.5001).all()


@given(BITS, SEED)
def test_zero_is_exactly_zero(bits, seed):
    values = draw(seed)
    values[:, ::3] = 0
    scale = scale_of(values, bits, torch.bfloat16)
    back = dequantize(round_to_codes(values, scale, bits).to(torch.int8), scale.bfloat16(), None)
    assert (back[:, ::3] == 0).all()


@given(
    BITS,
    st.sampled_from([4, 8, 16, None]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    SEED,
)
def test_what_lies_on_the_grid_is_found_again(bits, group_size, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    low, high = bounds(bits)
    codes = torch.randint(low, high + 1, (4, 16), generator=generator, dtype=torch.int8)
    scale = torch.rand(4, 16 // (group_size or 16), generator=generator).add(0.5).to(dtype)
    wide = scale.float().repeat_interleave(group_size or 16, 1)
    exact = codes.float() * wide
    assert torch.equal(round_to_codes(exact, wide, bits).to(torch.int8), codes)
    stored = Codes(codes, scale, bits, group_size).dequantize()
    assert stored.dtype == dtype
    assert torch.equal(stored, exact.to(dtype))


def test_scales_are_rounded_to_what_is_stored_first():
    values = draw(3)
    scale = scale_of(values, 4, torch.bfloat16)
    assert torch.equal(scale, scale.bfloat16().float())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_group_of_zeros_has_scale_one(bits):
    assert torch.equal(scale_of(torch.zeros(3, 8), bits, torch.bfloat16), torch.ones(3, 1))


def test_bounds():
    assert [bounds(bits) for bits in (2, 4, 8)] == [(-2, 1), (-8, 7), (-128, 127)]
