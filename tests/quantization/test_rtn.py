"""Round to nearest: every weight at the nearest point of its grid, zeros at zero."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.model.grid import bounds
from stages.quantization.rtn import RTN
from tests.families import DEVICE

pytestmark = pytest.mark.device


def rtn(bits: int, group_size: int | None) -> RTN:
    return RTN(
        source="base/m", method="rtn", bits=bits, group_size=group_size, calibration={"dataset": "none"}
    )


def drawn(seed: int, rows: int = 5, columns: int = 32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def test_round_to_nearest_is_nearest():
    weight = drawn(0)
    code = rtn(3, 8).weights(weight, None)
    low, high = bounds(3)
    grid = code.scale.repeat_interleave(8, 1)[..., None] * torch.arange(low, high + 1, device=DEVICE)
    best = (grid - weight[..., None]).abs().amin(-1)
    torch.testing.assert_close((code.dequantize() - weight).abs(), best)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 8), st.sampled_from([8, 16, None]), st.sampled_from([torch.bfloat16, torch.float32]),
    st.integers(0, 2**31), st.floats(0, 1),
)  # fmt: skip
def test_zeros_stay_zero_and_codes_in_range(bits, group_size, dtype, seed, sparsity):
    weight = drawn(seed)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE) < sparsity] = 0
    weight = weight.to(dtype)
    code = rtn(bits, group_size).weights(weight, None)
    low, high = bounds(bits)
    assert code.codes.dtype == torch.int8
    assert code.codes.min() >= low and code.codes.max() <= high
    assert code.scale.shape == (len(weight), weight.shape[1] // (group_size or weight.shape[1]))
    dense = code.dequantize()
    assert dense.dtype == dtype and dense.isfinite().all()
    assert (dense[weight == 0] == 0).all()


def test_a_weight_of_zeros_is_served():
    zeros = torch.zeros(4, 32, device=DEVICE)
    assert torch.equal(rtn(4, 8).weights(zeros, None).dequantize(), zeros)
