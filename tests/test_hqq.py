"""HQQ: by its own norm never worse than round to nearest, and better where there is something to gain."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.grid import Codes, Integers, bounds
from stages.quantize.hqq import HQQ


def hqq(bits: int, group_size: int | None, symmetric: bool = False, **options) -> HQQ:
    return HQQ(
        source="base/m", method="hqq", bits=bits, group_size=group_size, symmetric=symmetric,
        calibration={"dataset": "none"}, **options,
    )  # fmt: skip


def lost(weight: torch.Tensor, code: Codes, p: float = 0.7) -> torch.Tensor:
    """The norm of each group's error, by its definition."""
    groups = code.scale.shape[1]
    away = weight.double() - (
        (code.codes.double() - (0 if code.zero_point is None else wide(code.zero_point, weight)))
        * wide(code.scale, weight)
    )
    return away.abs().pow(p).view(len(weight), groups, -1).sum(2)


def wide(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return values.double().repeat_interleave(weight.shape[1] // values.shape[1], 1)


def outliers(seed: int) -> torch.Tensor:
    """A weight with a few large entries."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 64, generator=generator)
    return weight * (1 + 5 * (torch.rand(weight.shape, generator=generator) > 0.97))


@settings(deadline=None, max_examples=50)
@given(
    st.integers(2, 8), st.sampled_from([8, 16, None]), st.booleans(),
    st.sampled_from([torch.bfloat16, torch.float32]), st.integers(0, 2**31), st.floats(0, 1),
)  # fmt: skip
def test_no_group_is_worse_than_round_to_nearest_and_zeros_stay_zero(
    bits, group_size, symmetric, dtype, seed, sparsity
):
    weight = outliers(seed)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < sparsity] = 0
    weight = weight.to(dtype)
    code = hqq(bits, group_size, symmetric).weights(weight, None)
    near = Integers(bits, group_size, symmetric).nearest(weight)
    assert (lost(weight, code) <= lost(weight, near) * (1 + 1e-5)).all()
    low, high = bounds(bits)
    assert code.codes.min() >= low and code.codes.max() <= high
    assert code.scale.dtype == dtype and (code.scale > 0).all()
    assert (code.dequantize()[weight == 0] == 0).all()
    assert code.scheme() == near.scheme()


@pytest.mark.parametrize(("bits", "share"), [(2, 0.9), (3, 0.97), (4, 0.97)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_gains_where_weights_have_outliers(bits, share, symmetric):
    weight = outliers(0)
    near = Integers(bits, 32, symmetric).nearest(weight)
    code = hqq(bits, 32, symmetric).weights(weight, None)
    assert lost(weight, code).sum() < share * lost(weight, near).sum()


def test_a_weight_of_zeros_is_served():
    zeros = torch.zeros(4, 32)
    for symmetric in (True, False):
        assert torch.equal(hqq(4, 8, symmetric).weights(zeros, None).dequantize(), zeros)


def test_more_iterations_are_never_worse():
    weight = outliers(2)
    few, many = (hqq(3, 16, iterations=count).weights(weight, None) for count in (2, 20))
    assert (lost(weight, many) <= lost(weight, few) * (1 + 1e-5)).all()
