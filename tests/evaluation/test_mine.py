"""Mutual information of distributions whose mutual information is known, up to the bound of the estimate."""

import math

import pytest
import torch

from stages.evaluation.mine import bound, mutual_information

pytestmark = pytest.mark.numerics


def pair(rho: float, seed: int, rows: int = 1024, width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussians; each column of one has correlation `rho` with the same column of the other."""
    draw = torch.Generator().manual_seed(seed)
    x, other = (torch.randn(rows, width, generator=draw) for _ in range(2))
    return x, rho * x + math.sqrt(1 - rho**2) * other


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.5, 0.9])
def test_the_bound_on_gaussians_is_close(rho):
    truth = -4 / 2 * math.log2(1 - rho**2)
    values = [mutual_information(*pair(rho, seed), 200, 64, seed) for seed in range(3)]
    assert all(truth * 0.6 - 0.05 <= value <= truth * 1.1 + 0.05 for value in values)


def test_more_information_than_the_pairs_can_show_ends_near_the_bound():
    x, y = pair(0.9999, 0, width=256)  # 1573 bits
    assert bound(len(x)) == 9
    assert 7 < mutual_information(x, y, 200, 64, 0) <= 9


def test_fitting_does_not_make_up_information():
    assert mutual_information(*pair(0.0, 0, rows=128, width=64), 300, 64, 0) == 0


def test_mutual_information_depends_on_neither_scale_nor_place():
    x, y = pair(0.8, 0)
    assert mutual_information(1000 * x + 5, y / 1000 - 5, 50, 16, 0) == pytest.approx(
        mutual_information(x, y, 50, 16, 0), abs=0.01
    )
    # A constant column has no information and breaks nothing.
    constant = torch.cat([x, torch.ones(len(x), 1)], 1)
    assert mutual_information(constant, y, 200, 64, 0) > 1
