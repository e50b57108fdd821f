"""The sweep over columns against the same algebra in fp64, one column at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.compress.statistics import Hessian
from stages.compress.surgeon import COLUMNS, sweep
from stages.core.errors import Refusal
from tests.hessians import ChosenHessian

pytestmark = [pytest.mark.numerics, pytest.mark.device]


def problem(columns: int, rows: int = 4) -> tuple[torch.Tensor, Hessian]:
    """Draw a weight `[in, out]` and the Hessian of correlated inputs."""
    draw = torch.Generator().manual_seed(columns)
    mixed = torch.randn(columns, columns, generator=draw) / columns**0.5
    statistic = Hessian(columns, torch.device("cpu"))
    statistic.add(torch.randn(4 * columns, columns, generator=draw) @ mixed)
    return torch.randn(columns, rows, generator=draw), statistic


def half(j: int, values: torch.Tensor) -> torch.Tensor:
    """Settle without jumps, so that fp32 and fp64 stay close."""
    return values / 2 if j % 3 else values * 0


def slow(weight: torch.Tensor, statistic: Hessian) -> torch.Tensor:
    """Settle a column, then solve for the later columns that minimize the output error: slow."""
    hessian = statistic.matrix().double()
    hessian += 0.5 * hessian.diagonal().mean() * torch.eye(len(hessian))
    work = weight.double().clone()
    for j in range(len(work)):
        value = half(j, work[j].float()).double()
        moved = torch.linalg.solve(hessian[j + 1 :, j + 1 :], hessian[j + 1 :, j : j + 1])
        work[j + 1 :] += moved * (work[j] - value)
        work[j] = value
    return work.float()


@pytest.mark.parametrize("columns", [1, 2, 30, COLUMNS, COLUMNS + 1, 2 * COLUMNS + 17])
@pytest.mark.parametrize("panel", [1, 16, COLUMNS])
def test_the_sweep_is_the_least_squares_update(panel, columns):
    weight, statistic = problem(columns)
    swept = weight.clone()
    sweep(swept, statistic.inverse_factor(0.5), half, panel=panel)
    torch.testing.assert_close(swept, slow(weight, statistic), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("panel", [1, 16, COLUMNS])
def test_an_infinite_error_is_refused_even_if_settled_values_hide_it(panel):
    weight, statistic = problem(30)
    weight[3, 2] = torch.inf
    factor = statistic.inverse_factor(0.01)
    with pytest.raises(Refusal, match=r"overflows fp32; nothing was written\. Look"):
        sweep(weight, factor, lambda j, values: torch.zeros_like(values), panel=panel)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(1, 70))
def test_columns_are_settled_once_in_order_and_are_up_to_date_when_a_panel_begins(columns, panel):
    weight, statistic = problem(columns)
    settled: list[int] = []
    panels: list[tuple[int, int]] = []
    swept = weight.clone()
    reference = weight.clone()
    sweep(reference, statistic.inverse_factor(0.5), half, panel=1)

    def settle(j: int, values: torch.Tensor) -> torch.Tensor:
        settled.append(j)
        assert torch.equal(values, swept[j])
        return half(j, values)

    def begin(start: int, stop: int, current: torch.Tensor) -> None:
        assert start == len(settled) and current is swept
        panels.append((start, stop))
        torch.testing.assert_close(current[:start], reference[:start], rtol=1e-3, atol=1e-4)

    sweep(swept, statistic.inverse_factor(0.5), settle, begin=begin, panel=panel)
    assert settled == list(range(columns))
    assert panels == [(start, min(start + panel, columns)) for start in range(0, columns, panel)]


def test_columns_that_do_not_change_leave_nothing_to_compensate():
    weight, statistic = problem(200)
    swept = weight.clone()
    sweep(swept, statistic.inverse_factor(0.01), lambda j, values: values.clone())
    assert torch.equal(swept, weight)


def test_with_an_identity_hessian_nothing_is_compensated():
    weight, _ = problem(200)
    swept = weight.clone()
    sweep(swept, ChosenHessian(torch.eye(200)).inverse_factor(0.01), half)
    assert torch.equal(swept, torch.stack([half(j, row) for j, row in enumerate(weight)]))
