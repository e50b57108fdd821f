"""ERK: the published formula, worked out by hand."""

from types import SimpleNamespace

import pytest
import torch

from stages.model.blocks import linears
from stages.pruning.allocation import erk
from tests.allocations import allocation, shares


def test_erk_is_the_papers_formula(model):
    result = shares("erk", model, 0.5)
    shapes = {linear.name: linear.weight.shape for linear in linears(model)}
    density = {name: (rows + columns) / (rows * columns) for name, (rows, columns) in shapes.items()}
    kept = 0.5 * sum(rows * columns for rows, columns in shapes.values())
    factor = kept / sum(rows + columns for rows, columns in shapes.values())
    assert max(factor * value for value in density.values()) < 1  # no matrix stays dense at this sparsity
    assert result == pytest.approx({name: 1 - factor * value for name, value in density.items()})


def test_matrices_that_would_keep_more_than_all_stay_dense_and_the_others_lose_more(model):
    result = shares("erk", model, 0.2)
    sizes = {linear.name: linear.weight.numel() for linear in linears(model)}
    perimeters = {linear.name: sum(linear.weight.shape) for linear in linears(model)}
    dense = [name for name, share in result.items() if share == 0]
    assert {name.rpartition(".")[2] for name in dense} == {"k_proj", "v_proj"}
    assert sum(result[name] * size for name, size in sizes.items()) == pytest.approx(
        0.2 * sum(sizes.values())
    )
    factors = [
        (1 - share) * sizes[name] / perimeters[name] for name, share in result.items() if name not in dense
    ]
    assert max(factors) == pytest.approx(min(factors))


def test_sparsity_0_takes_nothing_though_rounding_puts_a_share_above_1(monkeypatch):
    """The linears of SmolLM2-135M: without rounding, the last matrices would keep exactly all."""
    attention, mlp = [(576, 576), (192, 576), (192, 576), (576, 576)], [(1536, 576), (1536, 576), (576, 1536)]
    targets = [
        SimpleNamespace(name=f"{block}.{number}", weight=torch.empty(shape, device="meta"))
        for block in range(30)
        for number, shape in enumerate(attention + mlp)
    ]
    monkeypatch.setattr(erk, "linears", lambda model, ignore: targets)
    result = allocation("erk").shares(SimpleNamespace(model=None), (), 0.0, None)
    assert result == {linear.name: 0.0 for linear in targets}
