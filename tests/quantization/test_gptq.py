"""GPTQ's choices certified in fp64, and zeros that stay zero."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.compress.statistics import Hessian
from stages.core.errors import Refusal
from stages.model.grid import Codes, Integers, bounds
from stages.quantization.gptq import GPTQ
from tests import families
from tests.hessians import ChosenHessian
from tests.pruners import named
from tests.replay import MISTAKES, certify_gptq, let_err

pytestmark = [pytest.mark.numerics, pytest.mark.device]
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
    weight = torch.randn(rows, columns, generator=generator)
    return weight.to(families.DEVICE), inputs.to(families.DEVICE)


def hessian(inputs: torch.Tensor) -> Hessian:
    statistic = Hessian(inputs.shape[1], inputs.device)
    statistic.add(inputs)
    return statistic


def sparse(weight: torch.Tensor, share: float = 0.5) -> torch.Tensor:
    zeros = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < share
    return weight.masked_fill(zeros.to(weight.device), 0)


def certify(code: Codes, weight: torch.Tensor, statistic: Hessian, options: Options, damping: float) -> None:
    _, _, act_order, static_groups = options
    certify_gptq(code, weight, statistic, damping, act_order=act_order, static_groups=static_groups)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("pruned", [False, True])
def test_no_option_makes_a_wrong_choice(bits, options, pruned):
    weight, inputs = problem(seed=bits)
    weight, statistic = sparse(weight) if pruned else weight, hessian(inputs)
    code = gptq(bits, options).weights(weight, statistic)
    assert (code.zero_point is None) == options[1]
    certify(code, weight, statistic, options, 0.01)


@pytest.mark.parametrize(
    "options",
    [
        (32, True, False, False), (160, True, False, False), (None, True, False, False),
        (32, False, True, True), (None, True, True, False),
    ],
)  # fmt: skip
def test_several_runs_of_columns_make_no_wrong_choice(options):
    weight, inputs = problem(seed=1, rows=3, columns=320, tokens=2000)
    statistic = hessian(inputs)
    code = gptq(4, options, damping=0.1).weights(weight, statistic)
    certify(code, weight, statistic, options, 0.1)


@pytest.mark.parametrize("options", OPTIONS)
def test_linears_that_share_inputs_are_rounded_side_by_side(options):
    weight, inputs = problem(seed=3, rows=9)
    linears, statistic = named(list(sparse(weight).split([4, 1, 4]))), hessian(inputs)
    results = list(gptq(4, options, damping=0.1).replace_group(linears, statistic, 3))
    assert len(results) == 3
    for linear, codes in zip(linears, results, strict=True):
        certify(codes, linear.weight, statistic, options, 0.1)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("bits", [2, 8])
def test_small_mistakes_are_refused(bits, mistake, monkeypatch):
    weight, inputs = problem(seed=bits)
    statistic = hessian(inputs)
    let_err(mistake, monkeypatch)
    code = gptq(bits, PLAIN).weights(weight, statistic)
    with pytest.raises(AssertionError):
        certify(code, weight, statistic, PLAIN, 0.01)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 8), st.sampled_from(OPTIONS), st.sampled_from([torch.bfloat16, torch.float32]), SEED)
def test_with_an_identity_hessian_it_is_round_to_nearest(bits, options, dtype, seed):
    weight = problem(seed)[0].to(dtype)
    near = Integers(bits, options[0], options[1]).nearest(weight)
    code = gptq(bits, options).weights(
        weight, ChosenHessian(torch.eye(weight.shape[1], device=weight.device))
    )
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
    total = torch.zeros(2)
    for seed in range(3):
        weight, inputs = problem(seed, rows=16, columns=64, tokens=1024)
        near = Integers(bits, group_size).nearest(weight).dequantize()
        values = gptq(bits, (group_size, True, False, False)).weights(weight, hessian(inputs)).dequantize()
        lost = torch.stack([(inputs @ (dense - weight).T).square().mean() for dense in (values, near)]).cpu()
        assert lost[0] < lost[1]
        total += lost
    assert total[0] < 0.8 * total[1]


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
    rest = torch.arange(32, device=weight.device) != 7
    assert torch.equal(again.codes[:, rest], code.codes[:, rest])


def test_a_weight_of_zeros_is_served():
    weight, inputs = problem(0)
    zeros = torch.zeros_like(weight)
    assert torch.equal(gptq(4).weights(zeros, hessian(inputs)).dequantize(), zeros)


def test_a_singular_hessian_is_damped_and_an_indefinite_one_refused():
    weight, inputs = problem(0, tokens=4)
    assert gptq(4).weights(weight, hessian(inputs)).dequantize().isfinite().all()
    indefinite = ChosenHessian((torch.full((32, 32), 3.0) - 2 * torch.eye(32)).to(weight.device))
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
