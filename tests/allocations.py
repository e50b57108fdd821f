"""Allocations over a model in memory, and their shares block by block."""

from typing import Any

import torch
from pydantic import TypeAdapter

from stages.model.blocks import blocks, linears
from stages.pruning.allocation.kinds import AnyAllocation
from stages.pruning.allocation.shares import Allocation
from tests import families
from tests.pruners import InMemorySource

KINDS = ("erk", "owl", "alpha", "layer-if")
"""Those under which linears lose different shares."""


def allocation(kind: str, **options: Any) -> Allocation:
    return TypeAdapter(AnyAllocation).validate_python({"kind": kind, **options})


def tokens(count: int = 6) -> torch.Tensor:
    return families.windows(count, 16, seed=1)


def shares(
    kind: str, model: torch.nn.Module, sparsity: float, ignore: tuple[str, ...] = (), **options: Any
) -> dict[str, float]:
    """Return the share of each linear, by full name."""
    return allocation(kind, **options).shares(InMemorySource(model), ignore, sparsity, tokens())


def by_block(model: torch.nn.Module, shares: dict[str, float]) -> list[float]:
    """Return the share of each block, which must be that of all its linears."""
    values = []
    for name, _ in blocks(model):
        (value,) = {shares[linear.name] for linear in linears(model) if linear.block == name}
        values.append(value)
    return values
