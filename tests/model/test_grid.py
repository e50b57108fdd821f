"""The integer grid: zero is exact, codes are in range, and rounding loses at most half a step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.model.grid import (
    Codes,
    Int8,
    Integers,
    bounds,
    dequantize,
    round_scale,
    round_to_codes,
    scale_of,
)
from tests.families import DEVICE

pytestmark = [pytest.mark.numerics, pytest.mark.device]
BITS = st.integers(2, 8)
SEED = st.integers(0, 2**31)


def draw(seed: int, rows: int = 4, columns: int = 16) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@given(BITS, SEED)
def test_codes_are_in_range_and_at_most_half_a_step_away(bits, seed):
    values = draw(seed)
    scale = scale_of(values, bits, torch.float32)
    codes = round_to_codes(values, scale, bits)
    low, high = bounds(bits)
    assert codes.min() >= low and codes.max() <= high
    assert torch.equal(codes, codes.round())
    # Clamping may cost the largest positive value half a step, more than rounding would.
    assert ((codes * scale - values).abs() <= scale * 0.5001).all()


@given(BITS, SEED)
def test_zero_is_exactly_zero(bits, seed):
    values = draw(seed)
    values[:, ::3] = 0
    scale = scale_of(values, bits, torch.bfloat16)
    dense = dequantize(round_to_codes(values, scale, bits).to(torch.int8), scale.bfloat16(), None)
    assert (dense[:, ::3] == 0).all()


@given(
    BITS,
    st.sampled_from([4, 8, 16, None]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    SEED,
)
def test_points_of_the_grid_round_to_themselves(bits, group_size, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    low, high = bounds(bits)
    codes = torch.randint(low, high + 1, (4, 16), generator=generator, dtype=torch.int8).to(DEVICE)
    scale = torch.rand(4, 16 // (group_size or 16), generator=generator).to(DEVICE).add(0.5).to(dtype)
    by_column = scale.float().repeat_interleave(group_size or 16, 1)
    exact = codes.float() * by_column
    assert torch.equal(round_to_codes(exact, by_column, bits).to(torch.int8), codes)
    dense = Codes(codes, scale, bits, group_size).dequantize()
    assert dense.dtype == dtype
    assert torch.equal(dense, exact.to(dtype))


def test_scales_have_the_precision_they_are_stored_in():
    values = draw(3)
    scale = scale_of(values, 4, torch.bfloat16)
    assert torch.equal(scale, scale.bfloat16().float())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_of_fp32_are_quotients_rounded_to_nearest(bits, symmetric):
    """A product with the divisor's reciprocal would differ in the last bit; fp64 rounds to the quotient."""
    values = draw(1000)
    least, most = values.amin(1, keepdim=True).clamp(max=0), values.amax(1, keepdim=True).clamp(min=0)
    width = 2 * values.abs().amax(1, keepdim=True) if symmetric else most - least
    scale, _ = Integers(bits, None, symmetric).fit(values, torch.float32)
    assert torch.equal(scale, (width.double() / (2**bits - 1)).float())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_group_of_zeros_has_scale_one(bits):
    assert torch.equal(
        scale_of(torch.zeros(3, 8, device=DEVICE), bits, torch.bfloat16), torch.ones(3, 1, device=DEVICE)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_scale_too_small_for_its_dtype_becomes_its_smallest_number(dtype):
    least = (
        torch.nextafter(
            torch.zeros((), dtype=dtype, device=DEVICE), torch.ones((), dtype=dtype, device=DEVICE)
        )
        .double()
        .item()
    )
    scales = torch.tensor([0.0, least / 4, least, 1.5, 8.0], dtype=torch.float64, device=DEVICE)
    assert round_scale(scales, dtype).tolist() == [1.0, least, least, 1.5, 8.0]


def test_bounds():
    assert [bounds(bits) for bits in (2, 4, 8)] == [(-2, 1), (-8, 7), (-128, 127)]


@given(
    BITS,
    st.sampled_from([4, 16, None]),
    st.booleans(),
    st.sampled_from([torch.bfloat16, torch.float32]),
    SEED,
)
def test_nearest_is_nearest_and_zero_is_on_the_grid(bits, group_size, symmetric, dtype, seed):
    weight = (draw(seed) + seed % 5 - 2).to(dtype)  # mostly on one side of zero
    weight[:, ::3] = 0
    code = Integers(bits, group_size, symmetric).nearest(weight)
    low, high = bounds(bits)
    scale, zero = (
        values.float().repeat_interleave(16 // code.scale.shape[1], 1)
        for values in (code.scale, torch.zeros_like(code.scale) if symmetric else code.zero_point)
    )
    grid = scale[..., None] * (torch.arange(low, high + 1, device=DEVICE) - zero[..., None])
    best = (grid - weight.float()[..., None]).abs().amin(2)
    torch.testing.assert_close(((code.codes.float() - zero) * scale - weight.float()).abs(), best)
    assert code.dequantize().dtype == dtype
    assert (code.dequantize()[:, ::3] == 0).all()
    assert code.nonzero() == torch.count_nonzero(code.dequantize())


@given(BITS, SEED)
def test_an_asymmetric_grid_spans_the_group(bits, seed):
    values = draw(seed).abs()
    scale, zero = Integers(bits, None, symmetric=False).fit(values, torch.float32)
    low, high = bounds(bits)
    assert (zero == low).all()  # no value is below zero
    torch.testing.assert_close(scale * (high - low), values.amax(1, keepdim=True))


def test_bits_are_those_of_codes_scales_and_zero_points():
    weight = draw(0).bfloat16()
    assert Integers(3, 8).nearest(weight).stored_bits() == 64 * 3 + 8 * 16
    assert Integers(3, 8, symmetric=False).nearest(weight).stored_bits() == 64 * 3 + 8 * (16 + 3)
    near = Integers(8, None).nearest(weight)
    assert Int8(near.codes, near.scale).stored_bits() == 64 * 8 + 4 * 16
