"""Statistics against the same sums written out in fp64."""

import pytest
import torch

from stages.core import statistics
from stages.core.errors import Refusal
from stages.core.statistics import ColumnNorm, Hessian

DTYPES = [torch.bfloat16, torch.float32]


def tokens(dtype: torch.dtype, count: int = 200, features: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(features, features, generator=generator) / features**0.5
    return (torch.randn(count, features, generator=generator) @ mixed).to(dtype)


def taken(kind, inputs: torch.Tensor, pieces: int = 1):
    statistic = kind(inputs.shape[1], inputs.device)
    for piece in inputs.chunk(pieces):
        statistic.add(piece)
    return statistic


@pytest.mark.parametrize("dtype", DTYPES)
def test_column_norm_is_the_direct_one(dtype):
    inputs = tokens(dtype)
    direct = inputs.double().square().mean(0).sqrt()
    norm = taken(ColumnNorm, inputs).norm()
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), direct, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hessian_is_the_direct_one(dtype):
    inputs = tokens(dtype)
    direct = 2 / len(inputs) * inputs.double().T @ inputs.double()
    matrix = taken(Hessian, inputs).matrix()
    assert matrix.dtype == torch.float32
    torch.testing.assert_close(matrix.double(), direct, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [ColumnNorm, Hessian])
@pytest.mark.parametrize("dtype", DTYPES)
def test_how_tokens_are_cut_up_does_not_matter(kind, dtype, monkeypatch):
    inputs = tokens(dtype)
    whole, pieces = taken(kind, inputs), taken(kind, inputs, pieces=7)
    monkeypatch.setattr(statistics, "CHUNK", 13)
    chunks = taken(kind, inputs)
    for other in (pieces, chunks):
        assert other.num_tokens == whole.num_tokens == len(inputs)
        read = (lambda s: s.norm()) if kind is ColumnNorm else (lambda s: s.matrix())
        torch.testing.assert_close(read(other), read(whole), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_factor_is_that_of_the_damped_inverse(dtype):
    inputs = tokens(dtype)
    statistic = taken(Hessian, inputs)
    upper = statistic.inverse_factor(0.01)
    damped = statistic.matrix().double()
    damped += 0.01 * damped.diagonal().mean() * torch.eye(len(damped))
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close((upper.T @ upper).double(), torch.linalg.inv(damped), rtol=1e-3, atol=1e-3)
    assert statistic.inverse_factor(0.01) is upper


def test_a_dead_feature_takes_no_part():
    inputs = tokens(torch.float32)
    inputs[:, 5] = 0
    statistic = taken(Hessian, inputs)
    assert statistic.dead().nonzero().flatten().tolist() == [5]
    upper = statistic.inverse_factor(0.01)
    assert (upper[5, 6:] == 0).all() and (upper[:5, 5] == 0).all()
    assert upper.isfinite().all()


def test_fewer_tokens_than_features_are_served_by_damping():
    assert taken(Hessian, tokens(torch.float32, count=3)).inverse_factor(0.01).isfinite().all()


def test_a_hessian_that_is_not_positive_definite_is_refused():
    with pytest.raises(
        Refusal, match=r"Hessian of 2 features .* not positive definite with damping 0.01; raise"
    ):
        Hessian.of(torch.tensor([[1.0, 3.0], [3.0, 1.0]])).inverse_factor(0.01)
