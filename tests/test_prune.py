"""Pruning methods as functions of a weight: exact counts, ties, and survivors left alone."""

from math import floor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.core.statistics import ColumnNorm
from stages.prune.exact import zero_smallest
from stages.prune.magnitude import Magnitude
from stages.prune.wanda import Wanda

NONE = {"dataset": "none"}
TEXT = {"dataset": "news"}
SPARSITY = st.floats(0, 0.99)
SHAPE = st.tuples(st.integers(1, 6), st.integers(1, 24))


def magnitude(sparsity: float, scope: str) -> Magnitude:
    return Magnitude(source="base/m", method="magnitude", sparsity=sparsity, scope=scope, calibration=NONE)


def wanda(sparsity: float) -> Wanda:
    return Wanda(source="base/m", method="wanda", sparsity=sparsity, calibration=TEXT)


def norms(values: torch.Tensor) -> ColumnNorm:
    statistic = ColumnNorm(len(values), values.device)
    statistic.add(values[None])
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


@given(weights(), SPARSITY, st.sampled_from([torch.float32, torch.bfloat16]))
def test_exact_counts_and_ties_to_the_lower_column(weight, sparsity, dtype):
    weight = weight.to(dtype) + 5  # no zero of its own, so that zeros are what was pruned
    scores = (weight.float() - 5).abs()
    result = zero_smallest(weight, scores, sparsity)
    count = floor(weight.shape[1] * sparsity + 1e-9)
    for row in range(len(weight)):
        mask = torch.tensor(slow_mask(scores[row].tolist(), count))
        assert torch.equal(result[row] == 0, mask)
        assert torch.equal(result[row][~mask], weight[row][~mask])


@given(weights(), SPARSITY)
def test_magnitude_over_a_matrix_ties_to_the_lower_flat_index(weight, sparsity):
    result = magnitude(sparsity, "matrix").weights(weight, None)
    mask = torch.tensor(slow_mask(weight.abs().flatten().tolist(), floor(weight.numel() * sparsity + 1e-9)))
    expected = torch.where(mask.view_as(weight), 0, weight)
    assert torch.equal(result, expected)


@given(weights(), SPARSITY)
def test_wanda_with_equal_norms_is_magnitude_by_row(weight, sparsity):
    loud = wanda(sparsity).weights(weight, norms(torch.full((weight.shape[1],), 2.0)))
    assert torch.equal(loud, magnitude(sparsity, "row").weights(weight, None))


@given(weights())
def test_sparsity_zero_changes_nothing(weight):
    statistic = norms(torch.arange(1.0, weight.shape[1] + 1))
    for result in (
        magnitude(0.0, "matrix").weights(weight, None),
        magnitude(0.0, "row").weights(weight, None),
        wanda(0.0).weights(weight, statistic),
    ):
        assert torch.equal(result, weight)


def test_a_given_count_that_floats_cannot_hold_is_not_lost():
    # 10 * 0.3 and 10 * 0.7 fall on either side of whole numbers in binary.
    row = torch.arange(1.0, 11)[None]
    for sparsity, count in ((0.3, 3), (0.7, 7), (0.1, 1), (0.9, 9)):
        assert int((zero_smallest(row, row, sparsity) == 0).sum()) == count


def test_wanda_weighs_by_how_loud_an_input_is():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    result = wanda(0.5).weights(weight, norms(torch.tensor([8.0, 1.0, 0.1, 1.0])))
    assert result.tolist() == [[1.0, 0.0, 0.0, 4.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_wanda_is_the_papers_formula_in_fp64(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 32, generator=generator).to(dtype)
    inputs = (torch.randn(50, 32, generator=generator) * torch.linspace(0.1, 4, 32)).to(dtype)
    statistic = ColumnNorm(32, inputs.device)
    statistic.add(inputs)
    result = wanda(0.5).weights(weight, statistic)
    scores = weight.double().abs() * inputs.double().square().mean(0).sqrt()
    for row in range(6):
        kept = scores[row].topk(16).indices.sort().values
        assert torch.equal(result[row].nonzero().flatten(), kept)
    assert result.dtype == dtype
