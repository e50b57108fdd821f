"""GPTQ's options against a slow reference that inverts what remains of H anew at every column, in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.compress.statistics import Hessian
from stages.model.grid import Integers, bounds
from stages.quantization.gptq import GPTQ

SEED = st.integers(0, 2**31)
OPTIONS = [  # group_size, symmetric, act_order, static_groups
    (8, False, False, False), (16, False, False, True), (8, True, False, True), (8, True, True, True),
    (16, False, True, True), (None, True, True, False), (None, False, True, False),
    (None, False, False, False),
]  # fmt: skip


def gptq(bits: int, options: tuple[int | None, bool, bool, bool], damping: float = 0.01) -> GPTQ:
    group_size, symmetric, act_order, static_groups = options
    return GPTQ(
        source="base/m", method="gptq", bits=bits, group_size=group_size, symmetric=symmetric,
        act_order=act_order, static_groups=static_groups, damping=damping, calibration={"dataset": "news"},
    )  # fmt: skip


def problem(seed: int, rows: int = 5, columns: int = 32, tokens: int = 256):
    """A weight and the statistic of correlated inputs whose features differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=generator) @ mixed
    inputs *= torch.rand(columns, generator=generator) + 0.1
    statistic = Hessian(columns, inputs.device)
    statistic.add(inputs)
    return torch.randn(rows, columns, generator=generator), statistic


def sparse(weight: torch.Tensor, share: float = 0.5) -> torch.Tensor:
    gone = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < share
    return weight.masked_fill(gone, 0)


def fitted(group: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of every row of a group, row by row.

    In fp32, as the largest weight lies just between two codes and any other precision may take the other.
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


def slow(weight: torch.Tensor, statistic: Hessian, bits: int, options, damping: float) -> torch.Tensor:
    """The values `[out, in]` of the quantized weight, fp64."""
    group_size, symmetric, act_order, static_groups = options
    columns, (low, high) = weight.shape[1], bounds(bits)
    size, hessian = group_size or columns, statistic.matrix().double()
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    work, keep = weight.double().clone(), weight != 0
    diagonal = hessian.diagonal().tolist()
    order = sorted(range(columns), key=lambda j: (-diagonal[j], j)) if act_order else list(range(columns))
    known = {
        g: fitted(weight[:, g * size : (g + 1) * size], bits, symmetric)
        for g in range(columns // size)
        if static_groups or not group_size
    }
    for step, j in enumerate(order):
        g, left = j // size, order[step:]
        if g not in known:
            group = slice(g * size, (g + 1) * size)
            known[g] = fitted(work[:, group] * keep[:, group], bits, symmetric)
        scale, zero = known[g]
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
    weight, statistic = problem(seed=bits)
    weight = sparse(weight) if pruned else weight
    found = gptq(bits, options).weights(weight, statistic).dequantize()
    torch.testing.assert_close(
        found.double(), slow(weight, statistic, bits, options, 0.01), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("options", [(32, False, True, True), (None, True, True, False)])
def test_order_by_activation_over_several_runs_of_columns(options):
    # Strong damping keeps H well conditioned, so that fp32 and fp64 round alike over all 320 columns.
    weight, statistic = problem(seed=1, rows=3, columns=320, tokens=2000)
    found = gptq(4, options, damping=0.9).weights(weight, statistic).dequantize()
    torch.testing.assert_close(found.double(), slow(weight, statistic, 4, options, 0.9), rtol=0, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 8), st.sampled_from(OPTIONS), st.sampled_from([torch.bfloat16, torch.float32]), SEED)
def test_with_an_identity_hessian_it_is_round_to_nearest(bits, options, dtype, seed):
    weight = problem(seed)[0].to(dtype)
    near = Integers(bits, options[0], options[1]).nearest(weight)
    found = gptq(bits, options).weights(weight, Hessian.of(torch.eye(weight.shape[1])))
    assert torch.equal(found.codes, near.codes) and torch.equal(found.scale, near.scale)
    assert found.scheme() == near.scheme()
    if not options[1]:
        assert torch.equal(found.zero_point, near.zero_point)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 8), st.sampled_from(OPTIONS), SEED, st.floats(0, 1))
def test_zeros_stay_zero(bits, options, seed, share):
    weight, statistic = problem(seed)
    weight = sparse(weight, share).bfloat16()
    found = gptq(bits, options).weights(weight, statistic)
    low, high = bounds(bits)
    assert found.codes.min() >= low and found.codes.max() <= high
    assert (found.dequantize()[weight == 0] == 0).all()


def test_static_scales_are_those_of_the_source():
    weight, statistic = problem(0)
    for options in OPTIONS:
        if options[3]:
            found = gptq(3, options).weights(weight, statistic)
            assert torch.equal(found.scale, Integers(3, options[0], options[1]).nearest(weight).scale)


def test_order_by_activation_pays_where_features_differ():
    lost = {True: 0.0, False: 0.0}
    for seed in range(5):
        weight, statistic = problem(seed, rows=16, columns=64, tokens=1024)
        for act_order in lost:
            found = gptq(3, (16, True, act_order, True)).weights(weight, statistic).dequantize()
            away = found - weight
            lost[act_order] += float((away @ statistic.matrix() * away).sum())
    assert lost[True] < 0.95 * lost[False]


def test_order_by_activation_without_static_groups_is_refused():
    with pytest.raises(ValidationError, match="add static_groups: true, or group_size: null"):
        gptq(4, (8, True, True, False))
