"""AlphaPruning: the published formulas, worked out by hand."""

import copy
import logging
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from stages.core.errors import Refusal
from stages.model.blocks import blocks, linears
from stages.pruning.allocation.alpha import hill, spectrum_of
from tests.allocations import by_block, shares
from tests.families import DEVICE

pytestmark = pytest.mark.numerics


def slow_hill(eigenvalues: list[float]) -> float:
    """1 + k / sum over the k largest of ln(largest_i / the largest below them), k half of all."""
    descending = sorted(eigenvalues, reverse=True)
    k = len(descending) // 2
    return 1 + k / sum(math.log(descending[i] / descending[k]) for i in range(k))


def expected_shares(exponents: list[float], sparsity: float, spread: float) -> list[float]:
    """Map the exponents of blocks of one size to shares with this mean."""
    low, high = min(exponents), max(exponents)
    raw = [1 - spread + 2 * spread * (exponent - low) / (high - low) for exponent in exponents]
    return [value * sparsity * len(raw) / sum(raw) for value in raw]


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=30, unique=True))
def test_hill_is_the_papers_estimator(values):
    ordered = sorted(values, reverse=True)
    assume(ordered[0] > 1.001 * ordered[len(ordered) // 2])  # a tail of equal values has no exponent
    assert hill(torch.tensor(values, dtype=torch.float64, device=DEVICE)) == pytest.approx(
        slow_hill(values), rel=1e-6
    )


def test_hill_finds_the_exponent_of_a_power_law():
    # Quantiles of a density that falls like x^-3.
    law = (1 - torch.linspace(0, 0.9999, 20001, dtype=torch.float64, device=DEVICE)) ** (-1 / 2)
    assert hill(law) == pytest.approx(3, abs=0.05)


def test_alpha_is_the_papers_formula(model):
    result = by_block(model, shares("alpha", model, 0.5, spread=0.25))
    exponents = []
    for block, _ in blocks(model):
        weights = [linear.weight.double() for linear in linears(model) if linear.block == block]
        grams = [w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w for w in weights]
        each = [slow_hill(torch.linalg.eigvalsh(gram).tolist()) for gram in grams]
        exponents.append(sum(each) / len(each))
    assert result == pytest.approx(expected_shares(exponents, 0.5, 0.25), rel=1e-3)
    # The heavier the tail, that is the smaller the exponent, the less is lost.
    assert result.index(min(result)) == exponents.index(min(exponents))


def test_weights_whose_squares_overflow_fp32_are_measured(model):
    result = by_block(model, shares("alpha", model, 0.5))
    large = copy.deepcopy(model)
    for linear in linears(large):
        linear.weight.mul_(2.0**70)
    assert by_block(large, shares("alpha", large, 0.5)) == pytest.approx(result, rel=1e-4)


def test_the_spectrum_leaves_out_what_fp32_cannot_tell_from_zero():
    draw = torch.Generator().manual_seed(0)
    tall, wide = (
        torch.randn(48, 12, generator=draw).to(DEVICE).double(),
        torch.randn(12, 64, generator=draw).to(DEVICE).double(),
    )
    result = spectrum_of((tall @ wide).float())
    exact = torch.linalg.svdvals(tall @ wide)[:12] ** 2
    torch.testing.assert_close(result, exact, rtol=1e-4, atol=0)
    assert hill(result) == pytest.approx(slow_hill(exact.tolist()), rel=1e-4)
    low_ranks = (
        torch.zeros(4, 8, device=DEVICE),
        torch.ones(4, 8, device=DEVICE),
        torch.eye(4, 8, device=DEVICE),
    )
    assert [len(spectrum_of(weight)) for weight in low_ranks] == [0, 1, 4]
    assert spectrum_of(torch.tensor([[1.0, math.nan], [1, 1]], device=DEVICE)).isnan().all()


def test_a_matrix_of_rank_one_or_zero_has_no_exponent(model, caplog):
    broken = copy.deepcopy(model)
    broken.model.layers[2].mlp.gate_proj.weight.data.zero_()
    broken.model.layers[2].mlp.up_proj.weight.data.fill_(0.1)
    logging.disable(logging.NOTSET)
    with caplog.at_level(logging.WARNING):
        result = by_block(broken, shares("alpha", broken, 0.5))
    exponents = []
    for name, _ in blocks(broken):
        spectra = [spectrum_of(linear.weight) for linear in linears(broken) if linear.block == name]
        each = [slow_hill(spectrum.tolist()) for spectrum in spectra if len(spectrum) > 1]
        exponents.append(sum(each) / len(each))
    assert result == pytest.approx(expected_shares(exponents, 0.5, 0.3), rel=1e-3)
    for name, rank in (("gate", 0), ("up", 1)):
        assert f"alpha: model.layers.2.mlp.{name}_proj has rank {rank}, no exponent" in caplog.text
    for linear in linears(broken):
        if linear.block == "model.layers.2":
            linear.weight.zero_()
    with pytest.raises(
        Refusal, match=r"alpha: no matrix of model\.layers\.2 has two nonzero singular values"
    ):
        shares("alpha", broken, 0.5)
