"""Pruning methods as functions of a weight: exact counts, ties, patterns, and slow references."""

import re
import textwrap
from itertools import combinations
from math import floor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.compress.select import extend_by_row, smallest, smallest_in_groups, smallest_overall
from stages.compress.statistics import ColumnNorm, Hessian
from stages.core.errors import Refusal
from stages.model.blocks import Linear, linears
from stages.model.grid import Codes
from stages.pruning.allocation.uniform import Uniform
from stages.pruning.magnitude import Magnitude, global_zeros
from stages.pruning.random import Random
from stages.pruning.sparsegpt import SparseGPT, zeros_by_run
from stages.pruning.wanda import Wanda
from tests import families
from tests.hessians import ChosenHessian
from tests.project import ROOT
from tests.replay import MISTAKES, certify_sparsegpt, let_err

NONE = {"dataset": "none"}
TEXT = {"dataset": "news"}
FLOORS = {"kind": "uniform", "floor_rows": True}
SPARSITY = st.floats(0, 0.99)
SHAPE = st.tuples(st.integers(1, 6), st.integers(1, 24))
PATTERNS = [(2, 4), (4, 8), (1, 4), (1, 2), (3, 4)]


def magnitude(sparsity: float, scope: str, **options) -> Magnitude:
    return Magnitude(
        source="base/m", method="magnitude", sparsity=sparsity, scope=scope, calibration=NONE, **options
    )


def wanda(sparsity: float, **options) -> Wanda:
    return Wanda(source="base/m", method="wanda", sparsity=sparsity, calibration=TEXT, **options)


def sparsegpt(sparsity: float, **options) -> SparseGPT:
    return SparseGPT(source="base/m", method="sparsegpt", sparsity=sparsity, calibration=TEXT, **options)


def norms(values: torch.Tensor) -> ColumnNorm:
    statistic = ColumnNorm(len(values), values.device)
    statistic.add(values[None])
    return statistic


def hessian(inputs: torch.Tensor) -> Hessian:
    statistic = Hessian(inputs.shape[1], inputs.device)
    statistic.add(inputs)
    return statistic


def slow_mask(scores: list[float], count: int) -> list[bool]:
    """The positions of the `count` smallest, ties to the lower index: sorted by hand."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return [i in order[:count] for i in range(len(scores))]


@st.composite
def weights(draw):
    """Small integers as weights, so that ties abound."""
    rows, columns = draw(SHAPE)
    flat = draw(st.lists(st.integers(-3, 3), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(flat, dtype=torch.float32).view(rows, columns)


def lowest_by_row(scores: torch.Tensor, count: int) -> torch.Tensor:
    return extend_by_row(scores.__getitem__, torch.zeros_like(scores, dtype=torch.bool), count)


@given(weights(), SPARSITY)
def test_the_smallest_of_all_and_of_each_row(weight, share):
    rows, columns = weight.shape
    count = floor(share * weight.numel())
    overall = torch.tensor(slow_mask(weight.flatten().tolist(), count)).view(rows, columns)
    assert torch.equal(smallest_overall(weight, count), overall)
    each = floor(share * columns)
    by_row = torch.tensor([slow_mask(row.tolist(), each) for row in weight])
    assert torch.equal(smallest(weight, each), by_row)
    assert torch.equal(lowest_by_row(weight, each * rows), by_row)


@given(weights(), st.data())
def test_every_row_may_have_a_count_of_its_own(weight, data):
    rows, columns = weight.shape
    each = data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))
    expected = torch.tensor([slow_mask(row.tolist(), n) for row, n in zip(weight, each, strict=True)])
    assert torch.equal(smallest(weight, torch.tensor(each)), expected)


@given(weights(), SPARSITY)
def test_a_count_that_rows_cannot_share_evenly_is_met_all_the_same(weight, share):
    rows = len(weight)
    count = floor(share * weight.numel())
    mask = lowest_by_row(weight, count)
    each = mask.sum(1).tolist()
    assert sum(each) == count
    assert max(each) - min(each) <= 1
    for row, number in enumerate(each):
        assert mask[row].tolist() == slow_mask(weight[row].tolist(), number)
    # Those that lose one more lie evenly apart.
    for upto in range(rows + 1):
        assert abs(sum(each[:upto]) - count * upto / rows) < 1


@given(st.data(), st.sampled_from(PATTERNS), st.integers(1, 3), st.integers(1, 3))
def test_n_of_m_is_the_exhaustive_choice(data, pattern, rows, groups):
    keep, size = pattern
    drawn = st.lists(st.integers(0, 6), min_size=rows * groups * size, max_size=rows * groups * size)
    scores = torch.tensor(data.draw(drawn), dtype=torch.float32).view(rows, groups * size)
    gone = smallest_in_groups(scores, keep, size)
    for row in range(rows):
        for start in range(0, groups * size, size):
            group = scores[row, start : start + size].tolist()
            # The choice that keeps most; of equals the one that removes the lowest columns.
            best = min(
                combinations(range(size), size - keep), key=lambda out: (sum(group[i] for i in out), out)
            )
            assert gone[row, start : start + size].nonzero().flatten().tolist() == list(best)


@pytest.mark.parametrize("structure", ["2:4", "4:8"])
def test_every_method_keeps_n_of_m(structure):
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(6, 64, generator=generator), torch.randn(200, 64, generator=generator)
    size = int(structure[-1])
    options = {"structure": structure}
    linear = Linear("block", "block.fc", torch.nn.Linear(64, 6, bias=False), False)
    linear.weight.copy_(weight)
    drawn = Random(
        source="base/m", method="random", sparsity=0.5, seed=0, calibration=NONE, structure=structure
    )
    for made in (
        magnitude(0.5, "matrix", **options).weights(weight, None, 192),
        wanda(0.5, **options).weights(weight, norms(torch.ones(64)), 192),
        sparsegpt(0.5, **options).weights(weight, hessian(inputs), 192),
        drawn.replace(linear, None, {"block.fc": 192}),
    ):
        assert ((made.view(-1, size) == 0).sum(1) == size // 2).all()


@given(weights(), SPARSITY, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_magnitude_over_a_matrix_ties_to_the_lower_flat_index(weight, sparsity, dtype):
    method = magnitude(sparsity, "matrix")
    count = method.zeros(*weight.shape)
    assert count == floor(weight.numel() * sparsity + 1e-6)
    mask = torch.tensor(slow_mask(weight.abs().flatten().tolist(), count)).view_as(weight)
    expected = torch.where(mask, 0, weight).to(dtype)
    assert torch.equal(method.weights(weight.to(dtype), None, count), expected)


@given(weights(), SPARSITY)
def test_wanda_with_equal_norms_is_magnitude_by_row(weight, sparsity):
    weight = weight.masked_fill(weight == 0, 4)  # rows with more zeros than asked for are another matter
    for evenly in ({}, {"allocation": {"kind": "uniform", "floor_rows": False}}):
        count = wanda(sparsity, **evenly).zeros(*weight.shape)
        assert count == magnitude(sparsity, "row", **evenly).zeros(*weight.shape)
        assert count == floor(weight.numel() * sparsity + 1e-6)
    loud = wanda(sparsity).weights(weight, norms(torch.full((weight.shape[1],), 2.0)), count)
    assert torch.equal(loud, magnitude(sparsity, "row").weights(weight, None, count))
    each = (loud == 0).sum(1)
    assert int(each.sum()) == count and int(each.max()) - int(each.min()) <= 1
    mask = torch.tensor([slow_mask(row.abs().tolist(), n) for row, n in zip(weight, each, strict=True)])
    assert torch.equal(loud, torch.where(mask, 0, weight))


@given(weights(), SPARSITY)
def test_rows_may_lose_the_floor_of_their_share_as_in_the_papers(weight, sparsity):
    weight = weight.masked_fill(weight == 0, 4)
    count = wanda(sparsity, allocation=FLOORS).zeros(*weight.shape)
    assert count == magnitude(sparsity, "row", allocation=FLOORS).zeros(*weight.shape)
    assert count == len(weight) * floor(weight.shape[1] * sparsity + 1e-6)
    loud = wanda(sparsity).weights(weight, norms(torch.full((weight.shape[1],), 2.0)), count)
    expected = magnitude(sparsity, "row").weights(weight, None, count)
    assert torch.equal(loud, expected)
    each = count // len(weight)
    mask = torch.tensor([slow_mask(row.abs().tolist(), each) for row in weight])
    assert torch.equal(expected, torch.where(mask, 0, weight))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.613, 0.99])
def test_under_uniform_every_matrix_loses_its_share_to_within_one_weight(sparsity, family):
    model = families.model(family)
    sizes = {one.name: one.weight.numel() for one in linears(model)}
    drawn = Random(source="base/m", method="random", sparsity=sparsity, seed=0, calibration=NONE)
    by_row = [wanda(sparsity), magnitude(sparsity, "row")]
    for method in (*by_row, magnitude(sparsity, "matrix"), sparsegpt(sparsity), drawn):
        plan = method.plan(Whole(model), pytest.fail)
        assert plan.keys() == sizes.keys()
        assert all(-1 < plan[name] - sparsity * size <= 1e-6 for name, size in sizes.items())
        assert method.notes(plan) == {}
    for method in by_row:
        floors = method.model_copy(update={"allocation": Uniform(kind="uniform", floor_rows=True)})
        for one in linears(model):
            rows, columns = one.weight.shape
            assert floors.plan(Whole(model), pytest.fail)[one.name] == rows * floor(columns * sparsity + 1e-6)


@given(weights())
def test_sparsity_zero_changes_nothing(weight):
    statistic = norms(torch.arange(1.0, weight.shape[1] + 1))
    inputs = torch.randn(50, weight.shape[1], generator=torch.Generator().manual_seed(0))
    for result in (
        magnitude(0.0, "matrix").weights(weight, None, 0),
        magnitude(0.0, "row").weights(weight, None, 0),
        wanda(0.0).weights(weight, statistic, 0),
        sparsegpt(0.0).weights(weight, hessian(inputs), 0),
    ):
        assert torch.equal(result, weight)


def test_a_pattern_whose_share_has_no_last_digit_is_served():
    for sparsity in (0.666667, 2 / 3):
        for scope in ("matrix", "row"):
            method = magnitude(sparsity, scope, structure="1:3")
            made = method.weights(torch.tensor([[1.0, -3, 2, 0.5, 0.4, 0.3]]), None, 4)
            assert made.tolist() == [[0, -3, 0, 0.5, 0, 0]]


def test_a_given_share_that_floats_cannot_hold_is_not_lost():
    # 10 * 0.3 and 10 * 0.7 fall on either side of whole numbers in binary.
    for sparsity, count in ((0.3, 3), (0.7, 7), (0.1, 1), (0.9, 9)):
        assert magnitude(sparsity, "matrix").zeros(1, 10) == count
        assert wanda(sparsity).zeros(3, 10) == 3 * count


@settings(deadline=None)
@given(weights(), SPARSITY, st.sampled_from(["magnitude", "row", "wanda", "sparsegpt", "random"]))
def test_zeros_that_are_there_stay_and_count(weight, sparsity, name):
    """Small integers hold many zeros, often more than asked for."""
    rows, columns = weight.shape
    inputs = torch.randn(60, columns, generator=torch.Generator().manual_seed(1))
    count = magnitude(sparsity, "matrix").zeros(rows, columns)
    if name == "random":
        linear = Linear("b", "b.fc", torch.nn.Linear(columns, rows, bias=False), False)
        linear.weight.copy_(weight)
        method = Random(source="base/m", method="random", sparsity=sparsity, seed=3, calibration=NONE)
        made = method.replace(linear, None, {"b.fc": count})
    elif name == "sparsegpt":
        made = sparsegpt(sparsity).weights(weight, hessian(inputs), count)
    elif name == "wanda":
        made = wanda(sparsity).weights(weight, norms(inputs[0].abs() + 0.1), count)
    else:
        made = magnitude(sparsity, "row" if name == "row" else "matrix").weights(weight, None, count)
    there = weight == 0
    assert (made[there] == 0).all()
    assert int((made == 0).sum()) == max(count, int(there.sum()))
    if name in ("wanda", "row"):  # rows are as level as what they had lets them be
        had, has = there.sum(1), (made == 0).sum(1)
        raised = has[has > had]
        assert not raised.numel() or int(raised.max()) <= int(has.min()) + 1


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
@pytest.mark.parametrize("quiet", [0.0, 1e-30])
def test_zeros_go_before_weights_whose_score_is_zero_too(quiet, structure):
    """Inputs are dead, or so quiet that scores underflow, and there are zeros in later columns."""
    weight = torch.full((2, 8), 1e-20)
    weight[:, 2:4] = weight[:, 6:] = 0
    made = wanda(0.5, structure=structure).weights(weight, norms(torch.full((8,), quiet)), 8)
    assert torch.equal(made, weight)


def test_wanda_weighs_by_how_loud_an_input_is():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    result = wanda(0.5).weights(weight, norms(torch.tensor([8.0, 1.0, 0.1, 1.0])), 2)
    assert result.tolist() == [[1.0, 0.0, 0.0, 4.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_wanda_is_the_papers_formula_in_fp64(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 32, generator=generator).to(dtype)
    inputs = (torch.randn(50, 32, generator=generator) * torch.linspace(0.1, 4, 32)).to(dtype)
    statistic = ColumnNorm(32, inputs.device)
    statistic.add(inputs)
    result = wanda(0.5).weights(weight, statistic, 96)
    scores = weight.double().abs() * inputs.double().square().mean(0).sqrt()
    for row in range(6):
        kept = scores[row].topk(16).indices.sort().values
        assert torch.equal(result[row].nonzero().flatten(), kept)
    assert result.dtype == dtype


class Whole:
    """A source all in memory, looked at block by block."""

    def __init__(self, model: torch.nn.Module) -> None:
        from stages.compress.walk import InMemory

        self.model, self.block = model, InMemory().block


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("ties", [False, True])
def test_one_threshold_over_all_matrices_is_a_plain_sort(ties, sparsity, family, dtype):
    model = families.model(family).to(dtype)
    found = linears(model)
    for number, linear in enumerate(found):
        drawn = torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(number))
        # Values that share their upper 16 bits in fp32, so that the lower ones decide.
        drawn = (drawn * 4).round() / 4 if ties else drawn.sign() * (1 + drawn.abs() * 1e-4)
        linear.weight.copy_(drawn * (1 + number % 3))
    every = torch.cat([linear.weight.flatten() for linear in found]).float().abs()
    count = floor(len(every) * sparsity + 1e-6)
    gone = torch.zeros(len(every), dtype=torch.bool)
    gone[every.sort(stable=True).indices[:count]] = True
    parts = gone.split([linear.weight.numel() for linear in found])

    zeros = global_zeros(Whole(model), (), sparsity)
    assert list(zeros) == [linear.name for linear in found]
    assert sum(zeros.values()) == count
    method = magnitude(sparsity, "global")
    for linear, part in zip(found, parts, strict=True):
        assert zeros[linear.name] == int(part.sum())
        made = method.weights(linear.weight, None, zeros[linear.name])
        assert torch.equal(made, linear.weight.masked_fill(part.view_as(linear.weight), 0))


def test_a_global_threshold_leaves_out_what_is_ignored():
    model = families.model("llama")
    zeros = global_zeros(Whole(model), ("mlp.up_proj",), 0.5)
    assert not any("up_proj" in name for name in zeros) and len(zeros) == 12
    inside = sum(linear.weight.numel() for linear in linears(model, ("mlp.up_proj",)))
    assert sum(zeros.values()) == inside // 2


def test_random_depends_on_its_seed_and_the_linears_name_only():
    model = families.model("llama")
    by_name = {linear.name: linear for linear in linears(model)}
    one, other = by_name["model.layers.0.mlp.up_proj"], by_name["model.layers.1.mlp.up_proj"]

    def drawn(linear: Linear, seed: int) -> torch.Tensor:
        method = Random(source="base/m", method="random", sparsity=0.5, seed=seed, calibration=NONE)
        return method.replace(linear, None, {linear.name: 1024}) == 0

    first = drawn(one, 0)
    torch.rand(7)  # nobody's generator but its own
    drawn(other, 0)
    one.weight.mul_(2)
    assert torch.equal(drawn(one, 0), first)
    assert int(first.sum()) == 1024
    assert not torch.equal(drawn(one, 1), first)
    assert not torch.equal(drawn(other, 0), first)


def problem(seed: int, rows: int, columns: int, tokens: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and correlated inputs of it."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=generator) @ mixed
    return torch.randn(rows, columns, generator=generator), inputs


@pytest.mark.parametrize("columns", [16, 48, 128, 200])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("sparse", [False, True])
def test_sparsegpt_makes_no_wrong_choice(sparse, sparsity, columns):
    weight, inputs = problem(seed=columns, rows=5, columns=columns, tokens=4 * columns)
    if sparse:
        weight[:, ::7] = 0
    inputs[:, 3] = 0  # dead
    statistic, method = hessian(inputs), sparsegpt(sparsity, damping=0.1)
    zeros = method.zeros(*weight.shape)
    made = method.weights(weight, statistic, zeros)
    certify_sparsegpt(made, weight, statistic, 0.1, zeros=zeros)
    assert int((made == 0).sum()) == zeros
    assert (made[weight == 0] == 0).all() and (made[:, 3] == 0).all()


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
@pytest.mark.parametrize("size", [1e-25, 1e20, 1e30])
def test_sparsegpt_chooses_alike_whatever_the_weights_are_multiplied_by(size, structure):
    """Squares of these are more, or less, than fp32 holds."""
    weight, inputs = problem(seed=3, rows=6, columns=160, tokens=640)
    weight[:2, ::3] = 0
    statistic, method = hessian(inputs), sparsegpt(0.5, structure=structure)
    zeros = method.zeros(*weight.shape)
    made = method.weights(weight * size, statistic, zeros)
    assert torch.equal(made == 0, method.weights(weight, statistic, zeros) == 0)
    assert made.isfinite().all() and (made[weight == 0] == 0).all()
    if structure == "unstructured":
        assert int((made == 0).sum()) == zeros


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 3), (5, 6)])
def test_sparsegpt_of_n_of_m_makes_no_wrong_choice(pattern):
    keep, size = pattern
    weight, inputs = problem(seed=size, rows=5, columns=144, tokens=600)
    weight[0, :12] = 0  # more zeros than the pattern asks for
    statistic = hessian(inputs)
    method = sparsegpt(1 - keep / size, structure=f"{keep}:{size}", damping=0.1)
    made = method.weights(weight, statistic, 0)
    certify_sparsegpt(made, weight, statistic, 0.1, pattern=pattern)
    assert (made[0, :12] == 0).all()
    assert ((made[1:].reshape(-1, size) == 0).sum(1) == size - keep).all()


@pytest.mark.parametrize(
    ("share", "structure"),
    [(0.1, "unstructured"), (0.3, "unstructured"), (0.6, "unstructured"), (0.5, "2:4"), (0.25, "3:4")],
)
@pytest.mark.parametrize("sparse", [False, True])
def test_dead_columns_go_first_and_no_further_than_asked(sparse, share, structure):
    """A third of the features are dead: the zeros asked for are fewer than theirs, about as many, or more."""
    weight, inputs = problem(seed=7, rows=6, columns=96, tokens=400)
    inputs[:, ::3] = 0
    if sparse:
        weight[1, :36] = 0
    statistic, method = hessian(inputs), sparsegpt(share, damping=0.1, structure=structure)
    zeros, pattern = method.zeros(*weight.shape), method.pattern
    made = method.weights(weight, statistic, zeros)
    certify_sparsegpt(made, weight, statistic, 0.1, zeros=zeros, pattern=pattern)
    there, gone, dead = weight == 0, made == 0, statistic.dead().expand_as(weight)
    assert gone[there].all()
    if pattern:
        least = there.view(-1, pattern[1]).sum(1).clamp(min=pattern[1] - pattern[0])
        assert torch.equal(gone.view(-1, pattern[1]).sum(1), least)
    else:
        assert int(gone.sum()) == zeros
    if share == 0.1:  # not all of them went: nothing else did, and no weight moved
        assert not (gone & ~dead & ~there).any()
        assert weight[gone & dead & ~there].abs().max() < weight[~gone & dead].abs().min()
        assert torch.equal(made[~gone], weight[~gone])


@pytest.mark.parametrize("structure", ["unstructured", "3:4"])
def test_dead_columns_that_stay_are_rounded_as_they_are(structure):
    weight, inputs = problem(seed=8, rows=6, columns=96, tokens=400)
    inputs[:, :32] = 0
    grid = {"bits": 8, "group_size": 8}
    method = sparsegpt(0.25, structure=structure, grid=grid)
    made = method.weights(weight, hessian(inputs), method.zeros(*weight.shape)).dequantize()
    gone = made == 0
    assert int(gone[:, :32].sum()) >= 48 and int((gone & (weight.abs() > 0.1)).sum()) <= 144
    stayed = ~gone[:, :32]
    assert stayed.any()
    torch.testing.assert_close(made[:, :32][stayed], weight[:, :32][stayed], rtol=0, atol=0.02)


@pytest.mark.parametrize("group_size", [8, 16, None])
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_sparsegpt_onto_a_grid_makes_no_wrong_choice(pattern, bits, group_size):
    weight, inputs = problem(seed=bits, rows=4, columns=144, tokens=600)
    statistic = hessian(inputs)
    structure = f"{pattern[0]}:{pattern[1]}" if pattern else "unstructured"
    method = sparsegpt(0.5, structure=structure, damping=0.3, grid={"bits": bits, "group_size": group_size})
    made = method.weights(weight, statistic, 288)
    assert isinstance(made, Codes) and made.bits == bits and made.group_size == group_size
    certify_sparsegpt(made, weight, statistic, 0.3, zeros=288, pattern=pattern)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
def test_small_mistakes_of_sparsegpt_are_refused(structure, bits, mistake, monkeypatch):
    weight, inputs = problem(seed=bits, rows=4, columns=144, tokens=600)
    statistic = hessian(inputs)
    method = sparsegpt(0.5, structure=structure, damping=0.3, grid={"bits": bits, "group_size": 16})
    let_err(mistake, monkeypatch)
    made = method.weights(weight, statistic, 288)
    with pytest.raises(AssertionError):
        certify_sparsegpt(made, weight, statistic, 0.3, zeros=288, pattern=method.pattern)


def test_sparsegpt_loses_less_of_the_output_than_wanda_and_wanda_less_than_magnitude():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = problem(seed=0, rows=32, columns=96, tokens=2000)
    inputs = inputs * torch.linspace(0.2, 3, 96)[torch.randperm(96, generator=generator)]
    norm = ColumnNorm(96, inputs.device)
    norm.add(inputs)
    lost = [
        float(((made - weight) @ inputs.T).square().mean())
        for made in (
            sparsegpt(0.5).weights(weight, hessian(inputs), 1536),
            wanda(0.5).weights(weight, norm, 1536),
            magnitude(0.5, "row").weights(weight, None, 1536),
        )
    ]
    assert lost[0] < 0.9 * lost[1] and lost[1] < 0.9 * lost[2]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=9), st.integers(1, 4), st.floats(0, 1))
def test_what_is_still_to_go_of_each_run_of_columns(there, run, share):
    """Twelve rows; the columns of a run hold as many zeros as drawn."""
    gone = torch.stack([torch.arange(12) < number for number in there])
    zeros = floor(share * gone.numel())
    counts = zeros_by_run(gone, zeros, run)
    parts = gone.split(run)
    assert len(counts) == len(parts)
    assert sum(counts) == max(zeros - int(gone.sum()), 0)
    assert all(0 <= count <= int((~part).sum()) for count, part in zip(counts, parts, strict=True))
    if not gone.any():  # the papers' rule
        for number in range(len(parts) + 1):
            assert sum(counts[:number]) == zeros * min(number * run, len(there)) // len(there)


def test_a_grid_no_linear_is_cut_evenly_by_is_refused():
    method = sparsegpt(0.5, grid={"bits": 4, "group_size": 24})
    with pytest.raises(
        Refusal, match=r"group_size 24 does not divide the input width of 14 linears: model\.l"
    ):
        method.plan(Whole(families.model("llama")), pytest.fail)


def test_a_pattern_no_linear_is_cut_evenly_by_is_refused():
    for method in (magnitude(0.75, "row", structure="6:24"), sparsegpt(0.75, structure="6:24")):
        with pytest.raises(
            Refusal, match=r"structure 6:24: 24 does not divide the input width of 14 linears: m"
        ):
            method.plan(Whole(families.model("llama")), pytest.fail)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"structure": "4:2"}, "N:M with N < M"),
        ({"structure": "2:4", "sparsity": 0.6}, "structure 2:4 is a sparsity of 0.5, not 0.6"),
        ({"structure": "1:3", "sparsity": 0.6667}, "structure 1:3 is a sparsity of 0.666667, not 0.6667"),
        ({"structure": "2:4", "allocation": {"kind": "erk"}}, "leaves nothing to allocate"),
        ({"scope": "global", "structure": "2:4"}, "scope global is an allocation of its own"),
        ({"scope": "global", "allocation": {"kind": "erk"}}, "scope global is an allocation of its own"),
        ({"allocation": {"kind": "owl"}}, "allocation owl is measured on text; name a data set"),
        ({"allocation": FLOORS}, "floor_rows is for methods that compare"),
        ({"scope": "global", "allocation": FLOORS}, "floor_rows is for methods that compare"),
        ({"scope": "row", "structure": "2:4", "allocation": FLOORS}, "leaves nothing to allocate"),
        (
            {"allocation": {"kind": "layer-if"}, "calibration": TEXT | {"batch_size": 2}},
            "allocation layer-if takes one window at a time; leave batch_size out",
        ),
        (
            {"allocation": {"kind": "layer-if"}, "calibration": TEXT | {"num_samples": 1}},
            "allocation layer-if needs num_samples of 2 or more",
        ),
        (
            {"calibration": {"dataset": "news"}},
            "must be {dataset: none}, as no part of this recipe reads text",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, said):
    settings = {
        "source": "base/m", "method": "magnitude", "scope": "matrix", "sparsity": 0.5, "calibration": NONE,
    } | options  # fmt: skip
    with pytest.raises(ValidationError) as refused:
        Magnitude.model_validate(settings)
    assert said in str(refused.value)


def test_a_batch_size_is_allowed_where_something_takes_windows_in_batches():
    for_layer_if = {"allocation": {"kind": "layer-if"}}
    text = TEXT | {"batch_size": 2, "sequential": "block"}
    assert Wanda(source="base/m", method="wanda", sparsity=0.5, calibration=text, **for_layer_if)
    generated = {"tokens": "generated", "seed": 0, "temperature": 1.0, "prompt_length": 4}
    for options, more in ((for_layer_if, generated), ({"allocation": {"kind": "owl"}}, {})):
        settings = {"source": "base/m", "method": "magnitude", "sparsity": 0.5, "scope": "row", **options}
        chosen = TEXT | {"batch_size": 2} | more
        assert Magnitude.model_validate(settings | {"calibration": chosen}).calibration.batch_size == 2


def test_floors_of_rows_are_refused_where_rows_are_not_compared():
    with pytest.raises(ValidationError, match="floor_rows is for methods that compare"):
        sparsegpt(0.5, allocation=FLOORS)
    with pytest.raises(ValidationError, match="floor_rows is for methods that compare"):
        Random(source="base/m", method="random", sparsity=0.5, seed=0, calibration=NONE, allocation=FLOORS)


def test_the_method_of_the_contributors_guide_works():
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(textwrap.dedent(snippet), names)
    weight, inputs = problem(seed=0, rows=6, columns=32, tokens=40)
    method = names["Cube"](source="base/m", method="cube", sparsity=0.4, calibration=TEXT)
    made = method.weights(weight, norms(inputs[0]), method.zeros(6, 32))
    scores = (weight.abs() ** 3 * inputs[0].abs()).flatten().tolist()
    mask = torch.tensor(slow_mask(scores, 76)).view_as(weight)
    assert torch.equal(made, torch.where(mask, 0, weight))


@pytest.mark.parametrize("dead", [0, 3])
def test_an_indefinite_hessian_is_refused_and_a_singular_one_damped(dead):
    weight, inputs = problem(seed=0, rows=4, columns=32, tokens=4)
    inputs[:, :dead] = 0
    made = sparsegpt(0.5).weights(weight, hessian(inputs), 64)
    assert made.isfinite().all() and int((made == 0).sum()) == 64
    indefinite = ChosenHessian(torch.full((32, 32), 3.0) - 2 * torch.eye(32))
    with pytest.raises(Refusal, match=r"not positive definite with damping 0\.01; raise damping"):
        sparsegpt(0.5).weights(weight, indefinite, 64)
