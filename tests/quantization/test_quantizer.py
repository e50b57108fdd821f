"""Quantizers as functions of a weight: GPTQ against a slow reference, and zeros that stay zeros."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.compress.statistics import Hessian
from stages.core.errors import Refusal
from stages.model.grid import bounds, round_to_codes, scale_of
from stages.quantization.gptq import GPTQ
from stages.quantization.rtn import RTN

SEED = st.integers(0, 2**31)
GROUP = st.sampled_from([8, 16, None])
DTYPE = st.sampled_from([torch.bfloat16, torch.float32])


def rtn(bits: int, group_size: int | None) -> RTN:
    return RTN(
        source="base/m", method="rtn", bits=bits, group_size=group_size, calibration={"dataset": "none"}
    )


def gptq(bits: int, group_size: int | None, damping: float = 0.01) -> GPTQ:
    return GPTQ(
        source="base/m", method="gptq", bits=bits, group_size=group_size, damping=damping,
        calibration={"dataset": "news"},
    )  # fmt: skip


def problem(
    seed: int, rows: int = 5, columns: int = 32, tokens: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and correlated inputs of it."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=generator) @ mixed
    return torch.randn(rows, columns, generator=generator), inputs


def hessian(inputs: torch.Tensor) -> Hessian:
    statistic = Hessian(inputs.shape[1], inputs.device)
    statistic.add(inputs)
    return statistic


def slow_gptq(weight: torch.Tensor, statistic: Hessian, bits: int, group_size: int | None, damping: float):
    """Optimal brain surgery column by column: the inverse of what remains of H, anew at each column, fp64."""
    damped = statistic.matrix().double()
    damped.diagonal()[statistic.dead()] = 1
    damped += damping * damped.diagonal().mean() * torch.eye(len(damped), dtype=torch.float64)
    work, keep, size = weight.double().clone(), weight != 0, group_size or weight.shape[1]
    codes = torch.zeros_like(weight, dtype=torch.int8)
    for j in range(weight.shape[1]):
        if j % size == 0:
            group = (work[:, j : j + size] * keep[:, j : j + size]).float()
            scale = scale_of(group, bits, weight.dtype)[:, 0]
        column = work[:, j]
        codes[:, j] = (round_to_codes(column.float(), scale, bits) * keep[:, j]).to(torch.int8)
        inverse = torch.linalg.inv(damped[j:, j:])
        error = (column - (codes[:, j] * scale).to(weight.dtype).double()) / inverse[0, 0]
        work[:, j:] -= error[:, None] * inverse[0]
    return codes


@pytest.mark.parametrize("group_size", [8, 16, None])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sparse", [False, True])
def test_gptq_is_the_slow_reference(bits, group_size, sparse):
    weight, inputs = problem(seed=bits)
    if sparse:
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    statistic = hessian(inputs)
    found = gptq(bits, group_size).weights(weight, statistic)
    assert torch.equal(found.codes, slow_gptq(weight, statistic, bits, group_size, 0.01))


@pytest.mark.parametrize("group_size", [32, 160, None])
def test_gptq_is_the_slow_reference_over_several_blocks_of_columns(group_size):
    # Strong damping keeps H well conditioned, so that fp32 and fp64 round alike over all 320 columns.
    weight, inputs = problem(seed=1, rows=3, columns=320, tokens=2000)
    statistic = hessian(inputs)
    found = gptq(4, group_size, damping=0.9).weights(weight, statistic)
    assert torch.equal(found.codes, slow_gptq(weight, statistic, 4, group_size, 0.9))


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 8), GROUP, DTYPE, SEED)
def test_gptq_with_an_identity_hessian_is_round_to_nearest(bits, group_size, dtype, seed):
    weight = problem(seed)[0].to(dtype)
    near = rtn(bits, group_size).weights(weight, None)
    found = gptq(bits, group_size).weights(weight, Hessian.of(torch.eye(weight.shape[1])))
    assert torch.equal(found.codes, near.codes)
    assert torch.equal(found.scale, near.scale)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 8), GROUP, DTYPE, SEED, st.floats(0, 1))
def test_zeros_stay_zero_and_codes_in_range(bits, group_size, dtype, seed, sparsity):
    weight, inputs = problem(seed)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < sparsity] = 0
    weight = weight.to(dtype)
    zeros = weight == 0
    for found in (
        rtn(bits, group_size).weights(weight, None),
        gptq(bits, group_size).weights(weight, hessian(inputs)),
    ):
        low, high = bounds(bits)
        assert found.codes.dtype == torch.int8
        assert found.codes.min() >= low and found.codes.max() <= high
        assert found.scale.shape == (len(weight), weight.shape[1] // (group_size or weight.shape[1]))
        dense = found.dequantize()
        assert dense.dtype == dtype and dense.isfinite().all()
        assert (dense[zeros] == 0).all()


@pytest.mark.parametrize("group_size", [8, None])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_loses_less_of_the_output_than_round_to_nearest(bits, group_size):
    for seed in range(3):
        weight, inputs = problem(seed, rows=16, columns=64, tokens=1024)
        near = rtn(bits, group_size).weights(weight, None).dequantize()
        found = gptq(bits, group_size).weights(weight, hessian(inputs)).dequantize()
        lost = [(inputs @ (dense - weight).T).square().mean() for dense in (found, near)]
        assert lost[0] < 0.8 * lost[1]


def test_round_to_nearest_is_nearest():
    weight = problem(0)[0]
    found = rtn(3, 8).weights(weight, None)
    low, high = bounds(3)
    grid = found.scale.repeat_interleave(8, 1)[..., None] * torch.arange(low, high + 1)
    best = (grid - weight[..., None]).abs().amin(-1)
    torch.testing.assert_close((found.dequantize() - weight).abs(), best)


def test_a_dead_column_is_rounded_as_it_is():
    weight, inputs = problem(0)
    inputs[:, 7] = 0
    statistic = hessian(inputs)
    found = gptq(8, None).weights(weight, statistic)
    dead = (found.dequantize()[:, 7] - weight[:, 7]).abs()
    assert (dead <= found.scale[:, 0] / 2 * 1.001).all()
    # What a dead column holds changes no other column's code, its scale being the same.
    other = weight.clone()
    other[:, 7] *= 0.5
    again = gptq(8, None).weights(other, statistic)
    rest = torch.arange(32) != 7
    assert torch.equal(again.codes[:, rest], found.codes[:, rest])


def test_a_weight_of_zeros_is_served():
    zeros = torch.zeros(4, 32)
    for found in (rtn(4, 8).weights(zeros, None), gptq(4, 8).weights(zeros, hessian(problem(0)[1]))):
        assert torch.equal(found.dequantize(), zeros)


def test_a_singular_hessian_is_damped_and_an_indefinite_one_refused():
    weight, inputs = problem(0, tokens=4)
    assert gptq(4, 8).weights(weight, hessian(inputs)).dequantize().isfinite().all()
    indefinite = Hessian.of(torch.full((32, 32), 3.0) - 2 * torch.eye(32))
    with pytest.raises(Refusal, match="not positive definite"):
        gptq(4, 8).weights(weight, indefinite)
