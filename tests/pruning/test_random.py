"""Random pruning: a draw that nothing else influences."""

import pytest
import torch

from stages.model.blocks import Linear, linears
from tests import families
from tests.pruners import random

pytestmark = pytest.mark.device


def test_the_draw_depends_only_on_the_seed_and_the_linears_name():
    by_name = {linear.name: linear for linear in linears(families.model("llama"))}
    first, second = by_name["model.layers.0.mlp.up_proj"], by_name["model.layers.1.mlp.up_proj"]

    def mask(linear: Linear, seed: int) -> torch.Tensor:
        return random(0.5, seed).replace(linear, None, {linear.name: 1024}) == 0

    expected = mask(first, 0)
    torch.rand(7)  # the global generator plays no part
    mask(second, 0)
    first.weight.mul_(2)
    assert torch.equal(mask(first, 0), expected)
    assert int(expected.sum()) == 1024
    assert not torch.equal(mask(first, 1), expected)
    assert not torch.equal(mask(second, 0), expected)
