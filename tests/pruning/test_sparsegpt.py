"""SparseGPT: certified in fp64, exact counts, dead features, grids."""

from math import floor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.compress.statistics import ColumnNorm
from stages.core.errors import Refusal
from stages.model.grid import Codes
from stages.pruning.sparsegpt import zeros_by_panel
from tests import families
from tests.hessians import ChosenHessian
from tests.pruners import InMemorySource, hessian, magnitude, named, problem, sparsegpt, wanda, zeros_of
from tests.replay import MISTAKES, certify_sparsegpt, let_err

pytestmark = [pytest.mark.numerics, pytest.mark.device]


@pytest.mark.parametrize("columns", [16, 48, 128, 200])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("sparse", [False, True])
def test_it_makes_no_wrong_choice(sparse, sparsity, columns):
    weight, inputs = problem(seed=columns, rows=5, columns=columns, tokens=4 * columns)
    if sparse:
        weight[:, ::7] = 0
    inputs[:, 3] = 0  # dead
    statistic, method = hessian(inputs), sparsegpt(sparsity, damping=0.1)
    zeros = zeros_of(method, *weight.shape)
    result = method.weights(weight, statistic, zeros)
    certify_sparsegpt(result, weight, statistic, 0.1, zeros=zeros)
    assert int((result == 0).sum()) == zeros
    assert (result[weight == 0] == 0).all() and (result[:, 3] == 0).all()


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
@pytest.mark.parametrize("size", [1e-25, 1e20, 1e30])
def test_the_mask_does_not_depend_on_the_size_of_the_weights(size, structure):
    """Squares of these sizes overflow or underflow fp32."""
    weight, inputs = problem(seed=3, rows=6, columns=160, tokens=640)
    weight[:2, ::3] = 0
    statistic, method = hessian(inputs), sparsegpt(0.5, structure=structure)
    zeros = zeros_of(method, *weight.shape)
    result = method.weights(weight * size, statistic, zeros)
    assert torch.equal(result == 0, method.weights(weight, statistic, zeros) == 0)
    assert result.isfinite().all() and (result[weight == 0] == 0).all()
    if structure == "unstructured":
        assert int((result == 0).sum()) == zeros


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 3), (5, 6)])
def test_n_of_m_makes_no_wrong_choice(pattern):
    keep, size = pattern
    weight, inputs = problem(seed=size, rows=5, columns=144, tokens=600)
    weight[0, :12] = 0  # more zeros than the pattern asks for
    statistic = hessian(inputs)
    method = sparsegpt(1 - keep / size, structure=f"{keep}:{size}", damping=0.1)
    result = method.weights(weight, statistic, 0)
    certify_sparsegpt(result, weight, statistic, 0.1, pattern=pattern)
    assert (result[0, :12] == 0).all()
    assert ((result[1:].reshape(-1, size) == 0).sum(1) == size - keep).all()


@pytest.mark.parametrize(
    ("share", "structure"),
    [(0.1, "unstructured"), (0.3, "unstructured"), (0.6, "unstructured"), (0.5, "2:4"), (0.25, "3:4")],
)
@pytest.mark.parametrize("sparse", [False, True])
def test_dead_columns_go_first_but_no_more_than_the_sparsity(sparse, share, structure):
    """A third of the features are dead, which is more than the sparsity, about as many, or fewer."""
    weight, inputs = problem(seed=7, rows=6, columns=96, tokens=400)
    inputs[:, ::3] = 0
    if sparse:
        weight[1, :36] = 0
    statistic, method = hessian(inputs), sparsegpt(share, damping=0.1, structure=structure)
    zeros, pattern = zeros_of(method, *weight.shape), method.pattern
    result = method.weights(weight, statistic, zeros)
    certify_sparsegpt(result, weight, statistic, 0.1, zeros=zeros, pattern=pattern)
    before, gone, dead = weight == 0, result == 0, statistic.dead().expand_as(weight)
    assert gone[before].all()
    if pattern:
        expected = before.view(-1, pattern[1]).sum(1).clamp(min=pattern[1] - pattern[0])
        assert torch.equal(gone.view(-1, pattern[1]).sum(1), expected)
    else:
        assert int(gone.sum()) == zeros
    if share == 0.1:  # some dead weights stay, so no other weight is removed or changed
        assert not (gone & ~dead & ~before).any()
        assert weight[gone & dead & ~before].abs().max() < weight[~gone & dead].abs().min()
        assert torch.equal(result[~gone], weight[~gone])


@pytest.mark.parametrize("structure", ["unstructured", "3:4"])
def test_dead_columns_that_stay_are_rounded_without_compensation(structure):
    weight, inputs = problem(seed=8, rows=6, columns=96, tokens=400)
    inputs[:, :32] = 0
    method = sparsegpt(0.25, structure=structure, grid={"bits": 8, "group_size": 8})
    result = method.weights(weight, hessian(inputs), zeros_of(method, *weight.shape)).dequantize()
    gone = result == 0
    assert int(gone[:, :32].sum()) >= 48 and int((gone & (weight.abs() > 0.1)).sum()) <= 144
    stays = ~gone[:, :32]
    assert stays.any()
    torch.testing.assert_close(result[:, :32][stays], weight[:, :32][stays], rtol=0, atol=0.02)


@pytest.mark.parametrize("group_size", [8, 16, None])
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_rounding_to_a_grid_makes_no_wrong_choice(pattern, bits, group_size):
    weight, inputs = problem(seed=bits, rows=4, columns=144, tokens=600)
    statistic = hessian(inputs)
    structure = f"{pattern[0]}:{pattern[1]}" if pattern else "unstructured"
    method = sparsegpt(0.5, structure=structure, damping=0.3, grid={"bits": bits, "group_size": group_size})
    codes = method.weights(weight, statistic, 288)
    assert isinstance(codes, Codes) and codes.bits == bits and codes.group_size == group_size
    certify_sparsegpt(codes, weight, statistic, 0.3, zeros=288, pattern=pattern)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
def test_small_mistakes_are_not_certified(structure, bits, mistake, monkeypatch):
    weight, inputs = problem(seed=bits, rows=4, columns=144, tokens=600)
    statistic = hessian(inputs)
    method = sparsegpt(0.5, structure=structure, damping=0.3, grid={"bits": bits, "group_size": 16})
    let_err(mistake, monkeypatch)
    codes = method.weights(weight, statistic, 288)
    with pytest.raises(AssertionError):
        certify_sparsegpt(codes, weight, statistic, 0.3, zeros=288, pattern=method.pattern)


@pytest.mark.parametrize("grid", [None, {"bits": 4, "group_size": 16}])
@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
def test_linears_that_share_inputs_are_pruned_each_by_its_own_count(structure, grid):
    weight, inputs = problem(seed=5, rows=11, columns=144, tokens=600)
    weight[:5] *= 10
    weight[5:7, ::3] = 0
    inputs[:, :20] = 0
    linears, statistic = named(list(weight.split([5, 2, 4]))), hessian(inputs)
    method = sparsegpt(0.5, structure=structure, damping=0.1, grid=grid)
    plan = {"0": 200, "1": 144, "2": 432}
    results = list(method.replace_group(linears, statistic, plan))
    assert len(results) == 3
    for linear, result in zip(linears, results, strict=True):
        zeros = plan[linear.name]
        certify_sparsegpt(result, linear.weight, statistic, 0.1, zeros=zeros, pattern=method.pattern)
        if not (grid or method.pattern):
            assert int((result == 0).sum()) == zeros


def test_errors_that_overflow_are_refused_where_they_are():
    weight, inputs = problem(seed=5, rows=4, columns=32)
    linears = named([weight, weight / weight.abs().max() * 3.4e38])
    results = sparsegpt(0.5).replace_group(linears, hessian(inputs), {"0": 64, "1": 64})
    assert next(results).isfinite().all()
    with pytest.raises(Refusal, match="overflows fp32"):
        next(results)


def test_sparsegpt_loses_less_of_the_output_than_wanda_and_wanda_less_than_magnitude():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = problem(seed=0, rows=32, columns=96, tokens=2000)
    inputs = inputs * torch.linspace(0.2, 3, 96)[torch.randperm(96, generator=generator)].to(inputs.device)
    norm = ColumnNorm(96, inputs.device)
    norm.add(inputs)
    best, middle, worst = (
        float(((result - weight) @ inputs.T).square().mean())
        for result in (
            sparsegpt(0.5).weights(weight, hessian(inputs), 1536),
            wanda(0.5).weights(weight, norm, 1536),
            magnitude(0.5, "row").weights(weight, None, 1536),
        )
    )
    assert best < 0.9 * middle and middle < 0.9 * worst


@given(st.lists(st.integers(0, 12), min_size=1, max_size=9), st.integers(1, 4), st.floats(0, 1))
def test_zeros_are_spread_evenly_over_panels(existing, panel, share):
    """Twelve rows; each column starts with some zeros."""
    gone = torch.stack([torch.arange(12) < number for number in existing])
    zeros = floor(share * gone.numel())
    counts = zeros_by_panel(gone, zeros, panel)
    parts = gone.split(panel)
    assert len(counts) == len(parts)
    assert sum(counts) == max(zeros, int(gone.sum()))
    assert all(int(part.sum()) <= count <= part.numel() for count, part in zip(counts, parts, strict=True))
    if not gone.any():  # the papers' rule
        for number in range(len(parts) + 1):
            assert sum(counts[:number]) == zeros * min(number * panel, len(existing)) // len(existing)


def test_a_group_size_that_divides_no_input_width_is_refused():
    method = sparsegpt(0.5, grid={"bits": 4, "group_size": 24})
    with pytest.raises(Refusal, match=r"group_size 24 does not divide the input width of 14 linears: model"):
        method.plan(InMemorySource(families.model("llama")), pytest.fail)


@pytest.mark.parametrize("dead", [0, 3])
def test_an_indefinite_hessian_is_refused_and_a_singular_one_damped(dead):
    weight, inputs = problem(seed=0, rows=4, columns=32, tokens=4)
    inputs[:, :dead] = 0
    result = sparsegpt(0.5).weights(weight, hessian(inputs), 64)
    assert result.isfinite().all() and int((result == 0).sum()) == 64
    indefinite = ChosenHessian((torch.full((32, 32), 3.0) - 2 * torch.eye(32)).to(weight.device))
    with pytest.raises(Refusal, match=r"not positive definite with damping 0\.01; raise damping"):
        sparsegpt(0.5).weights(weight, indefinite, 64)
