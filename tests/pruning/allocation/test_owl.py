"""OWL: the published formula, worked out by hand."""

import math
from contextlib import ExitStack

import pytest
import torch

from stages.model.blocks import blocks, linears
from tests.allocations import by_block, shares, tokens

pytestmark = [pytest.mark.numerics, pytest.mark.device]


def slow_owl(model: torch.nn.Module, sparsity: float, multiple: float, spread: float) -> list[float]:
    """2310.05175 with inputs of one plain forward; blocks have one size, so the plain mean is the target."""
    inputs: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks, torch.no_grad():
        for linear in linears(model):
            hooks.enter_context(
                linear.module.register_forward_hook(
                    lambda _, args, __, name=linear.name: inputs.update({name: args[0].double()})
                )
            )
        model(input_ids=tokens(), use_cache=False)
    ratios = []
    for block, _ in blocks(model):
        scores = []
        for linear in (linear for linear in linears(model) if linear.block == block):
            norm = inputs[linear.name].flatten(0, -2).norm(dim=0) / math.sqrt(tokens().numel())
            scores.append((linear.weight.double().abs() * norm).flatten())
        joined = torch.cat(scores)
        bound = multiple * joined.mean()
        assert ((joined - bound).abs() > 1e-5 * bound).all(), "fp32 could count a score on the other side"
        ratios.append(float((joined > bound).double().mean()))
    lowest, highest = min(ratios), max(ratios)
    kept = [2 * spread * (ratio - lowest) / (highest - lowest) for ratio in ratios]
    mean = sum(kept) / len(kept)
    return [1 - (value - mean + 1 - sparsity) for value in kept]


def test_owl_is_the_papers_formula(model):
    result = by_block(model, shares("owl", model, 0.6, multiple=4.0, spread=0.1))
    assert result == pytest.approx(slow_owl(model, 0.6, 4.0, 0.1), abs=1e-6)
    assert max(result) - min(result) == pytest.approx(0.2)
