"""The sweep over columns against the same algebra written out one column at a time in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.compress.statistics import Hessian
from stages.compress.surgeon import COLUMNS, sweep
from stages.core.errors import Refusal


def problem(columns: int, rows: int = 4) -> tuple[torch.Tensor, Hessian]:
    """A weight `[in, out]` and the Hessian of correlated inputs."""
    draw = torch.Generator().manual_seed(columns)
    mixed = torch.randn(columns, columns, generator=draw) / columns**0.5
    statistic = Hessian(columns, torch.device("cpu"))
    statistic.add(torch.randn(4 * columns, columns, generator=draw) @ mixed)
    return torch.randn(columns, rows, generator=draw), statistic


def half(j: int, values: torch.Tensor) -> torch.Tensor:
    """A change without jumps, so that fp32 and fp64 stay near each other."""
    return values / 2 if j % 3 else values * 0


def slow(weight: torch.Tensor, statistic: Hessian) -> torch.Tensor:
    """Settle a column, then solve anew for the columns to come that make the output error least."""
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
@pytest.mark.parametrize("run", [1, 16, COLUMNS])
def test_the_sweep_is_the_least_squares_update(run, columns):
    weight, statistic = problem(columns)
    made = weight.clone()
    sweep(made, statistic.inverse_factor(0.5), half, run=run)
    torch.testing.assert_close(made, slow(weight, statistic), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("run", [1, 16, COLUMNS])
def test_errors_that_settling_hides_are_refused(run):
    weight, statistic = problem(30)
    weight[3, 2] = torch.inf
    factor = statistic.inverse_factor(0.01)
    with pytest.raises(Refusal, match=r"grows past fp32; nothing was written\. Look"):
        sweep(weight, factor, lambda j, values: torch.zeros_like(values), run=run)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(1, 70))
def test_every_column_is_settled_once_in_order_and_runs_begin_up_to_date(columns, run):
    weight, statistic = problem(columns)
    seen: list[int] = []
    begun: list[tuple[int, int]] = []
    made = weight.clone()
    whole = weight.clone()
    sweep(whole, statistic.inverse_factor(0.5), half, run=1)

    def settle(j: int, values: torch.Tensor) -> torch.Tensor:
        seen.append(j)
        assert torch.equal(values, made[j])
        return half(j, values)

    def begin(start: int, stop: int, now: torch.Tensor) -> None:
        assert start == len(seen) and now is made
        begun.append((start, stop))
        torch.testing.assert_close(now[:start], whole[:start], rtol=1e-3, atol=1e-4)

    sweep(made, statistic.inverse_factor(0.5), settle, begin=begin, run=run)
    assert seen == list(range(columns))
    assert begun == [(start, min(start + run, columns)) for start in range(0, columns, run)]


def test_what_is_settled_as_it_is_passes_nothing_on():
    weight, statistic = problem(200)
    made = weight.clone()
    sweep(made, statistic.inverse_factor(0.01), lambda j, values: values.clone())
    assert torch.equal(made, weight)


def test_with_an_identity_hessian_nothing_is_passed_on():
    weight, _ = problem(200)
    made = weight.clone()
    sweep(made, Hessian.of(torch.eye(200)).inverse_factor(0.01), half)
    assert torch.equal(made, torch.stack([half(j, row) for j, row in enumerate(weight)]))
