"""Pruners of single weights, small problems for them, and slow references."""

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st

from stages.compress.home import InMemory
from stages.compress.statistics import ColumnNorm, Hessian
from stages.pruning.magnitude import Magnitude
from stages.pruning.pruner import Pruner
from stages.pruning.random import Random
from stages.pruning.sparsegpt import SparseGPT
from stages.pruning.wanda import Wanda
from tests import families

NONE = {"dataset": "none"}
TEXT = {"dataset": "news"}
FLOORS = {"kind": "uniform", "floor_rows": True}
"""An allocation that zeroes the floor of the share in every row."""
SPARSITY = st.floats(0, 0.99)


def magnitude(sparsity: float, scope: str, **options: Any) -> Magnitude:
    return Magnitude(
        source="base/m", method="magnitude", sparsity=sparsity, scope=scope, calibration=NONE, **options
    )


def wanda(sparsity: float, **options: Any) -> Wanda:
    return Wanda(source="base/m", method="wanda", sparsity=sparsity, calibration=TEXT, **options)


def sparsegpt(sparsity: float, **options: Any) -> SparseGPT:
    return SparseGPT(source="base/m", method="sparsegpt", sparsity=sparsity, calibration=TEXT, **options)


def random(sparsity: float, seed: int = 0, **options: Any) -> Random:
    return Random(source="base/m", method="random", sparsity=sparsity, seed=seed, calibration=NONE, **options)


def zeros_of(method: Pruner, rows: int, columns: int) -> int:
    """Return how many weights a matrix loses under a uniform allocation."""
    return method.allocation.zeros(method.sparsity, rows, columns)


def norms(values: torch.Tensor) -> ColumnNorm:
    """The statistic of a single input, so that its norms are the absolute `values` `[in]`."""
    statistic = ColumnNorm(len(values), values.device)
    statistic.add(values[None])
    return statistic


def hessian(inputs: torch.Tensor) -> Hessian:
    """The statistic of `inputs` `[tokens, in]`."""
    statistic = Hessian(inputs.shape[1], inputs.device)
    statistic.add(inputs)
    return statistic


def problem(seed: int, rows: int, columns: int, tokens: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a random weight `[rows, columns]` and correlated inputs of it `[tokens, columns]`."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=generator) @ mixed
    weight = torch.randn(rows, columns, generator=generator)
    return weight.to(families.DEVICE), inputs.to(families.DEVICE)


def named(weights: list[torch.Tensor]) -> list[Any]:
    """Linears of these weights `[out, in]`, by the names 0, 1, ..."""
    return [SimpleNamespace(name=str(number), weight=weight) for number, weight in enumerate(weights)]


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Draw a small matrix of small integers, so that ties abound."""
    rows, columns = draw(st.tuples(st.integers(1, 6), st.integers(1, 24)))
    flat = draw(st.lists(st.integers(-3, 3), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(flat, dtype=torch.float32, device=families.DEVICE).view(rows, columns)


def slow_mask(scores: list[float], count: int) -> list[bool]:
    """Mark the `count` lowest scores, ties to the lower index, by sorting."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return [i in order[:count] for i in range(len(scores))]


class InMemorySource:
    """A model in memory with the interface of a streamed source."""

    name = "base/m"

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.block = model, InMemory().block

    def bring_rest(self) -> None:
        """Nothing to load: embeddings are in memory too."""

    def whole(self) -> torch.nn.Module:
        return self.model
