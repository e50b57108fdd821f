"""Wanda: the published formula, and what it has in common with magnitude pruning by row."""

from math import floor

import pytest
import torch
from hypothesis import given

from stages.compress.statistics import ColumnNorm
from tests.pruners import FLOORS, SPARSITY, magnitude, norms, slow_mask, wanda, weights, zeros_of

pytestmark = [pytest.mark.numerics, pytest.mark.device]


@given(weights(), SPARSITY)
def test_with_equal_norms_it_is_magnitude_by_row(weight, sparsity):
    weight = weight.masked_fill(weight == 0, 4)  # rows with more zeros than the target keep them
    for evenly in ({}, {"allocation": {"kind": "uniform", "floor_rows": False}}):
        count = zeros_of(wanda(sparsity, **evenly), *weight.shape)
        assert count == zeros_of(magnitude(sparsity, "row", **evenly), *weight.shape)
        assert count == floor(weight.numel() * sparsity + 1e-6)
    result = wanda(sparsity).weights(
        weight, norms(torch.full((weight.shape[1],), 2.0, device=weight.device)), count
    )
    assert torch.equal(result, magnitude(sparsity, "row").weights(weight, None, count))
    counts = (result == 0).sum(1)
    assert int(counts.sum()) == count and int(counts.max()) - int(counts.min()) <= 1
    mask = torch.tensor([slow_mask(row.abs().tolist(), n) for row, n in zip(weight, counts, strict=True)])
    assert torch.equal(result.cpu(), torch.where(mask, 0, weight.cpu()))


@given(weights(), SPARSITY)
def test_rows_can_lose_the_floor_of_their_share_as_in_the_papers(weight, sparsity):
    weight = weight.masked_fill(weight == 0, 4)
    count = zeros_of(wanda(sparsity, allocation=FLOORS), *weight.shape)
    assert count == zeros_of(magnitude(sparsity, "row", allocation=FLOORS), *weight.shape)
    assert count == len(weight) * floor(weight.shape[1] * sparsity + 1e-6)
    result = wanda(sparsity).weights(
        weight, norms(torch.full((weight.shape[1],), 2.0, device=weight.device)), count
    )
    expected = magnitude(sparsity, "row").weights(weight, None, count)
    assert torch.equal(result, expected)
    mask = torch.tensor([slow_mask(row.abs().tolist(), count // len(weight)) for row in weight])
    assert torch.equal(expected.cpu(), torch.where(mask, 0, weight.cpu()))


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
@pytest.mark.parametrize("quiet", [0.0, 1e-30])
def test_zeros_go_before_weights_whose_score_is_zero(quiet, structure, device):
    """Inputs are dead, or so small that scores underflow, and there are zeros in later columns."""
    weight = torch.full((2, 8), 1e-20, device=device)
    weight[:, 2:4] = weight[:, 6:] = 0
    result = wanda(0.5, structure=structure).weights(weight, norms(torch.full((8,), quiet, device=device)), 8)
    assert torch.equal(result, weight)


def test_weights_count_by_the_norm_of_their_input(device):
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]], device=device)
    result = wanda(0.5).weights(weight, norms(torch.tensor([8.0, 1.0, 0.1, 1.0], device=device)), 2)
    assert result.tolist() == [[1.0, 0.0, 0.0, 4.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_wanda_is_the_papers_formula_in_fp64(dtype, device):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 32, generator=generator).to(device, dtype)
    inputs = (torch.randn(50, 32, generator=generator) * torch.linspace(0.1, 4, 32)).to(device, dtype)
    statistic = ColumnNorm(32, inputs.device)
    statistic.add(inputs)
    result = wanda(0.5).weights(weight, statistic, 96)
    scores, gone = weight.double().abs() * inputs.double().square().mean(0).sqrt(), result == 0
    assert (gone.sum(1) == 16).all() and torch.equal(result[~gone], weight[~gone])
    most, least = scores.masked_fill(~gone, 0).amax(1), scores.masked_fill(gone, torch.inf).amin(1)
    assert (most <= least * (1 + 1e-5)).all()
    assert result.dtype == dtype
