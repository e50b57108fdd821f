"""Weights in ggml's types: the library reads back exactly what the codes say."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.exporting.ggml_types import Unfit, packed, plain
from stages.model.floats import NVFloat4
from stages.model.grid import Codes, Int8, bounds

ONES = torch.ones(1, 32, dtype=torch.int8)


def drawn(bits, group, *, rows=6, columns=128, asymmetric=False, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low, high = bounds(bits)
    groups = columns // (group or columns)
    code = torch.randint(low, high + 1, (rows, columns), generator=generator, dtype=torch.int8)
    scale = (torch.rand(rows, groups, generator=generator) * 0.1 + 1e-3).to(dtype)
    if dtype is torch.float32:
        scale = scale.half().float()
    zeros = torch.randint(low, high + 1, (rows, groups), generator=generator, dtype=torch.int8)
    return Codes(code, scale, bits, group, zeros if asymmetric else None)


def exact(code):
    """The weight as the codes define it, without any rounding, fp64."""
    columns = code.codes.shape[1] // code.scale.shape[1]
    spread = lambda values: values.double().repeat_interleave(columns, 1)  # noqa: E731
    zeros = 0 if code.zero_point is None else spread(code.zero_point)
    return (code.codes.double() - zeros) * spread(code.scale)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([2, 3, 4, 8]), st.sampled_from([32, 64, 128, None]), st.integers(0, 2**31),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)  # fmt: skip
def test_symmetric_codes_are_read_back_to_the_last_bit(bits, group, seed, dtype):
    code = drawn(bits, group, seed=seed, dtype=dtype)
    stored = packed(code)
    assert stored.kind is (Kind.Q8_0 if bits == 8 else Kind.Q4_0)
    assert stored.rounding == 0
    assert np.array_equal(dequantize(stored.data, stored.kind), exact(code).float().numpy())


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([2, 3, 4]), st.sampled_from([32, 64, None]), st.integers(0, 2**31))
def test_asymmetric_codes_stay_and_minimums_are_rounded_once(bits, group, seed):
    code = drawn(bits, group, seed=seed, asymmetric=True)
    stored = packed(code)
    assert stored.kind is Kind.Q4_1
    read = dequantize(stored.data, stored.kind)
    step = code.scale.float().repeat_interleave(128 // code.scale.shape[1], 1).numpy()
    off = np.abs(read - exact(code).numpy()) / step
    # fp16 has 11 bits, and a minimum is at most 16 steps from 0.
    assert off.max() <= stored.rounding + 1e-5
    assert stored.rounding <= 16 * 2.0**-11
    nibbles = stored.data.reshape(6, -1, 20)[..., 4:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).reshape(6, 128)
    assert np.array_equal(codes, code.codes.numpy() + 8)


def test_outputs_are_reordered_with_their_scales_and_zero_points():
    code = drawn(4, 32, asymmetric=True)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert np.array_equal(packed(code, order).data, packed(code).data[order.numpy()])


def test_eight_bits_with_rounded_inputs_is_the_same_grid():
    plain_codes = drawn(8, None)
    other = Int8(plain_codes.codes, plain_codes.scale, 8, None)
    assert np.array_equal(packed(other).data, packed(plain_codes).data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_floats_keep_their_bits(dtype):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    stored = plain(weight)
    assert np.array_equal(dequantize(stored.data, stored.kind), weight.float().numpy())
    assert plain(weight[0]).kind is Kind.F32


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (drawn(4, 16), "groups of 16 columns do not split into blocks of 32"),
        (drawn(4, None, columns=40), "groups of 40 columns"),
        (drawn(5, 32), "no type for codes of 5 bits"),
        (drawn(8, 32, asymmetric=True), "no type for asymmetric codes of 8 bits"),
        (Codes(ONES, torch.tensor([[1e-7]]), 4, 32), "fp16 cannot hold 1 of 1 scale"),
        (Codes(ONES, torch.tensor([[1e5]]), 4, 32), "fp16 cannot hold 1 of 1 scale"),
    ],
)  # fmt: skip
def test_what_ggml_cannot_hold_is_named(code, words):
    with pytest.raises(Unfit, match=words):
        packed(code)


def test_a_float_grid_is_no_integer_grid():
    code = object.__new__(NVFloat4)
    with pytest.raises(Unfit, match="NVFloat4 is no integer grid"):
        packed(code)
