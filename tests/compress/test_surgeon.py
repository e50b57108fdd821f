"""The sweep over columns against the same algebra in fp64, one column at a time."""

import pytest
import torch

from stages.compress.rounding import Rounding
from stages.compress.statistics import Hessian
from stages.compress.surgeon import COLUMNS, check_errors, side_by_side, sweep
from stages.core.errors import Refusal
from stages.model.grid import Integers
from tests import families
from tests.hessians import ChosenHessian

pytestmark = [pytest.mark.numerics, pytest.mark.device]


def problem(columns: int, rows: int = 4) -> tuple[torch.Tensor, Hessian]:
    """Draw a weight `[in, out]` and the Hessian of correlated inputs."""
    draw = torch.Generator().manual_seed(columns)
    mixed = torch.randn(columns, columns, generator=draw) / columns**0.5
    statistic = Hessian(columns, torch.device(families.DEVICE))
    statistic.add((torch.randn(4 * columns, columns, generator=draw) @ mixed).to(families.DEVICE))
    return torch.randn(columns, rows, generator=draw).to(families.DEVICE), statistic


def third(weight: torch.Tensor) -> torch.Tensor:
    """Mark a third of the entries, bool."""
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(7)).to(weight.device) < 1 / 3


def slow(weight: torch.Tensor, statistic: Hessian, gone: torch.Tensor) -> list[torch.Tensor]:
    """Zero a column, then solve for the later columns that minimize the output error; the weight each time.

    It begins with the weight as it is.
    """
    hessian = statistic.matrix().double()
    hessian += 0.5 * hessian.diagonal().mean() * torch.eye(len(hessian)).to(hessian)
    work = weight.double().clone()
    states = [work.float()]
    for j in range(len(work)):
        value = work[j].masked_fill(gone[j], 0)
        moved = torch.linalg.solve(hessian[j + 1 :, j + 1 :], hessian[j + 1 :, j : j + 1])
        work[j + 1 :] += moved * (work[j] - value)
        work[j] = value
        states.append(work.float())
    return states


@pytest.mark.parametrize("columns", [1, 2, 30, COLUMNS, COLUMNS + 1, 2 * COLUMNS + 17])
@pytest.mark.parametrize("panel", [1, 16, COLUMNS])
def test_the_sweep_is_the_least_squares_update(panel, columns):
    weight, statistic = problem(columns)
    swept, gone = weight.clone(), third(weight)
    worst = sweep(swept, statistic.inverse_factor(0.5), gone, unit=panel, panel=panel)
    states = slow(weight, statistic, gone)
    torch.testing.assert_close(swept, states[-1], rtol=1e-3, atol=1e-4)
    assert (swept[gone] == 0).all()
    errors = torch.stack([(before - states[-1])[j].abs() for j, before in enumerate(states[:-1])])
    torch.testing.assert_close(worst, errors.amax(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("panel", [1, 16, COLUMNS])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_an_infinite_error_is_refused_even_if_settled_values_hide_it(bad, panel):
    weight, statistic = problem(30)
    weight[3, 2] = bad
    gone = torch.ones_like(weight, dtype=torch.bool)
    worst = sweep(weight, statistic.inverse_factor(0.01), gone, unit=panel, panel=panel)
    check_errors(worst[[0, 1, 3]])
    with pytest.raises(Refusal, match=r"overflows fp32; nothing was written\. Look"):
        check_errors(worst)


@pytest.mark.parametrize(
    ("columns", "unit", "panel"), [(60, 1, 4), (60, 4, 20), (61, 7, 70), (200, 48, 96), (200, 200, 200)]
)
def test_columns_are_up_to_date_when_they_are_decided_on(columns, unit, panel):
    weight, statistic = problem(columns)
    decided, gone = third(weight), torch.zeros_like(weight, dtype=torch.bool)
    states = slow(weight, statistic, decided)
    swept = weight.clone()
    begun: list[int] = []

    def begin(start: int) -> None:
        begun.append(start)
        now = slice(0, (start // panel + 1) * panel)
        torch.testing.assert_close(swept[now], states[start][now], rtol=1e-3, atol=1e-4)
        gone[start : start + unit] = decided[start : start + unit]

    sweep(swept, statistic.inverse_factor(0.5), gone, begin=begin, unit=unit, panel=panel)
    assert begun == list(range(0, columns, unit))
    torch.testing.assert_close(swept, states[-1], rtol=1e-3, atol=1e-4)


def test_columns_that_do_not_change_leave_nothing_to_compensate():
    weight, statistic = problem(200)
    swept = weight.clone()
    worst = sweep(swept, statistic.inverse_factor(0.01), torch.zeros_like(weight, dtype=torch.bool))
    assert torch.equal(swept, weight) and not worst.any()


def test_with_an_identity_hessian_nothing_is_compensated():
    weight, _ = problem(200)
    swept, gone = weight.clone(), third(weight)
    factor = ChosenHessian(torch.eye(200, device=weight.device)).inverse_factor(0.01)
    sweep(swept, factor, gone)
    assert torch.equal(swept, weight.masked_fill(gone, 0))


@pytest.mark.parametrize("symmetric", [True, False])
def test_with_an_identity_hessian_columns_are_rounded_to_nearest(symmetric):
    weight, _ = problem(200)
    near = Integers(4, 8, symmetric).nearest(weight.T)
    rounding = Rounding(Integers(4, 8, symmetric), work := weight.clone(), torch.float32)
    for group, columns in enumerate(work.split(8)):
        rounding.fit(group, columns)
    sweep(work, torch.eye(200, device=work.device), torch.zeros_like(work, dtype=torch.bool), rounding)
    assert torch.equal(work.T, near.dequantize())
    codes = rounding.result(slice(1, 3))
    assert torch.equal(codes.codes, near.codes[1:3]) and torch.equal(codes.scale, near.scale[1:3])


def test_weights_lie_side_by_side():
    weights = [torch.randn(rows, 5).to(torch.bfloat16) for rows in (3, 1, 4)]
    work, parts = side_by_side(weights)
    assert work.dtype == torch.float32 and work.is_contiguous() and work.shape == (5, 8)
    for weight, rows in zip(weights, parts, strict=True):
        assert torch.equal(work[:, rows].T, weight.float())
