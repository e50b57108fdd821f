"""GPTQ against a slow fp64 reference that inverts the rest of H at every column, and zeros that stay."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.compress.statistics import Hessian
from stages.core.errors import Refusal
from stages.model.grid import Integers, bounds
from stages.quantization.gptq import GPTQ
from tests.hessians import ChosenHessian

SEED = st.integers(0, 2**31)
Options = tuple[int | None, bool, bool, bool]
OPTIONS: list[Options] = [  # group_size, symmetric, act_order, static_groups
    (8, True, False, False), (16, True, False, False), (None, True, False, False),
    (8, False, False, False), (16, False, False, True), (8, True, False, True), (8, True, True, True),
    (16, False, True, True), (None, True, True, False), (None, False, True, False),
    (None, False, False, False),
]  # fmt: skip
PLAIN = (8, True, False, False)


def gptq(bits: int, options: Options = PLAIN, damping: float = 0.01) -> GPTQ:
    group_size, symmetric, act_order, static_groups = options
    return GPTQ(
        source="base/m", method="gptq", bits=bits, group_size=group_size, symmetric=symmetric,
        act_order=act_order, static_groups=static_groups, damping=damping, calibration={"dataset": "news"},
    )  # fmt: skip


def problem(
    seed: int, rows: int = 5, columns: int = 32, tokens: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a weight, and correlated inputs whose features differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=generator) @ mixed
    inputs *= torch.rand(columns, generator=generator) + 0.1
    return torch.randn(rows, columns, generator=generator), inputs


def hessian(inputs: torch.Tensor) -> Hessian:
    statistic = Hessian(inputs.shape[1], inputs.device)
    statistic.add(inputs)
    return statistic


def sparse(weight: torch.Tensor, share: float = 0.5) -> torch.Tensor:
    zeros = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < share
    return weight.masked_fill(zeros, 0)


def fitted(group: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point of every row of a group, row by row.

    In fp32: the largest weight is halfway between two codes, so another precision may round it differently.
    """
    low, high = bounds(bits)
    scales, zeros = [], []
    for row in group.float():
        if symmetric:
            scale, zero = max(abs(value) for value in row) / ((2**bits - 1) / 2), torch.tensor(0.0)
        else:
            least, most = min(torch.tensor(0.0), *row), max(torch.tensor(0.0), *row)
            scale = (most - least) / (2**bits - 1)
            zero = (low - least / scale).round() if scale else torch.tensor(0.0)
        scales.append(scale if scale else torch.tensor(1.0))
        zeros.append(zero.clamp(low, high))
    return torch.stack(scales), torch.stack(zeros)


def slow(
    weight: torch.Tensor, statistic: Hessian, bits: int, options: Options, damping: float
) -> torch.Tensor:
    """Return the values `[out, in]` of the quantized weight, fp64."""
    group_size, symmetric, act_order, static_groups = options
    columns, (low, high) = weight.shape[1], bounds(bits)
    size, matrix = group_size or columns, statistic.matrix().double()
    damped = matrix + damping * matrix.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    work, keep = weight.double().clone(), weight != 0
    diagonal = matrix.diagonal().tolist()
    order = sorted(range(columns), key=lambda j: (-diagonal[j], j)) if act_order else list(range(columns))
    grids = {
        g: fitted(weight[:, g * size : (g + 1) * size], bits, symmetric)
        for g in range(columns // size)
        if static_groups or not group_size
    }
    for step, j in enumerate(order):
        g, left = j // size, order[step:]
        if g not in grids:
            group = slice(g * size, (g + 1) * size)
            grids[g] = fitted(work[:, group] * keep[:, group], bits, symmetric)
        scale, zero = grids[g]
        code = ((work[:, j].float() / scale).round() + zero).clamp(low, high)
        value = ((code - zero) * scale * keep[:, j]).double()
        inverse = torch.linalg.inv(damped[left][:, left])
        work[:, left] -= ((work[:, j] - value) / inverse[0, 0])[:, None] * inverse[0]
        work[:, j] = value
    return work


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("pruned", [False, True])
def test_every_option_is_the_slow_reference(bits, options, pruned):
    weight, inputs = problem(seed=bits)
    weight, statistic = sparse(weight) if pruned else weight, hessian(inputs)
    values = gptq(bits, options).weights(weight, statistic).dequantize()
    torch.testing.assert_close(
        values.double(), slow(weight, statistic, bits, options, 0.01), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    "options",
    [
        (32, True, False, False), (160, True, False, False), (None, True, False, False),
        (32, False, True, True), (None, True, True, False),
    ],
)  # fmt: skip
def test_several_runs_of_columns_are_the_slow_reference(options):
    # Strong damping keeps H well conditioned, so that fp32 and fp64 round alike over all 320 columns.
    weight, inputs = problem(seed=1, rows=3, columns=320, tokens=2000)
    statistic = hessian(inputs)
    values = gptq(4, options, damping=0.9).weights(weight, statistic).dequantize()
    torch.testing.assert_close(values.double(), slow(weight, statistic, 4, options, 0.9), rtol=0, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 8), st.sampled_from(OPTIONS), st.sampled_from([torch.bfloat16, torch.float32]), SEED)
def test_with_an_identity_hessian_it_is_round_to_nearest(bits, options, dtype, seed):
    weight = problem(seed)[0].to(dtype)
    near = Integers(bits, options[0], options[1]).nearest(weight)
    code = gptq(bits, options).weights(weight, ChosenHessian(torch.eye(weight.shape[1])))
    assert torch.equal(code.codes, near.codes) and torch.equal(code.scale, near.scale)
    assert code.scheme() == near.scheme()
    if not options[1]:
        assert torch.equal(code.zero_point, near.zero_point)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 8), st.sampled_from(OPTIONS), SEED, st.floats(0, 1))
def test_zeros_stay_zero(bits, options, seed, share):
    weight, inputs = problem(seed)
    weight = sparse(weight, share).bfloat16()
    code = gptq(bits, options).weights(weight, hessian(inputs))
    low, high = bounds(bits)
    assert code.codes.dtype == torch.int8
    assert code.codes.min() >= low and code.codes.max() <= high
    dense = code.dequantize()
    assert dense.dtype == torch.bfloat16 and dense.isfinite().all()
    assert (dense[weight == 0] == 0).all()


def test_static_scales_are_those_of_the_source():
    weight, inputs = problem(0)
    for options in OPTIONS:
        if options[3]:
            code = gptq(3, options).weights(weight, hessian(inputs))
            assert torch.equal(code.scale, Integers(3, options[0], options[1]).nearest(weight).scale)


@pytest.mark.parametrize("group_size", [8, None])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_loses_less_of_the_output_than_round_to_nearest(bits, group_size):
    for seed in range(3):
        weight, inputs = problem(seed, rows=16, columns=64, tokens=1024)
        near = Integers(bits, group_size).nearest(weight).dequantize()
        values = gptq(bits, (group_size, True, False, False)).weights(weight, hessian(inputs)).dequantize()
        lost = [(inputs @ (dense - weight).T).square().mean() for dense in (values, near)]
        assert lost[0] < 0.85 * lost[1]


def test_order_by_activation_pays_where_features_differ():
    lost = {True: 0.0, False: 0.0}
    for seed in range(5):
        weight, inputs = problem(seed, rows=16, columns=64, tokens=1024)
        statistic = hessian(inputs)
        for act_order in lost:
            values = gptq(3, (16, True, act_order, True)).weights(weight, statistic).dequantize()
            away = values - weight
            lost[act_order] += float((away @ statistic.matrix() * away).sum())
    assert lost[True] < 0.95 * lost[False]


def test_a_dead_column_is_rounded_as_it_is():
    weight, inputs = problem(0)
    inputs[:, 7] = 0
    statistic, options = hessian(inputs), (None, True, False, False)
    code = gptq(8, options).weights(weight, statistic)
    error = (code.dequantize()[:, 7] - weight[:, 7]).abs()
    assert (error <= code.scale[:, 0] / 2 * 1.001).all()
    # As long as the scale stays the same, a dead column does not change the codes of other columns.
    other = weight.clone()
    other[:, 7] *= 0.5
    again = gptq(8, options).weights(other, statistic)
    rest = torch.arange(32) != 7
    assert torch.equal(again.codes[:, rest], code.codes[:, rest])


def test_a_weight_of_zeros_is_served():
    zeros, (_, inputs) = torch.zeros(4, 32), problem(0)
    assert torch.equal(gptq(4).weights(zeros, hessian(inputs)).dequantize(), zeros)


def test_a_singular_hessian_is_damped_and_an_indefinite_one_refused():
    weight, inputs = problem(0, tokens=4)
    assert gptq(4).weights(weight, hessian(inputs)).dequantize().isfinite().all()
    indefinite = ChosenHessian(torch.full((32, 32), 3.0) - 2 * torch.eye(32))
    with pytest.raises(Refusal, match="not positive definite"):
        gptq(4).weights(weight, indefinite)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((8, True, True, False), "add static_groups: true, or set group_size: null"),
        ((None, True, False, True), "static_groups has no effect with group_size: null; leave it out"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        gptq(4, options)
