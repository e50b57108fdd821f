"""QAT: gradients pass through rounding, but not beyond the range of the codes."""

import torch

from tests.tuned import quantized, recipe


def test_a_master_beyond_the_codes_gets_no_gradient():
    model, grid = quantized(bits=2)
    arm = recipe("qat", source="quantize/m", keep="none").arm(model, grid)
    name, weight = next(iter(arm.trained().items()))
    master = arm.state()[f"{name}.master"]
    (weight * -1.0).sum().backward()
    arm.masks.apply()
    assert (weight.grad == -1).all()
    arm.step(1.0)  # far beyond the largest code
    weight.grad = None
    outside = ~grid[name].inside(master)
    assert outside.any()
    (weight * -1.0).sum().backward()
    arm.masks.apply()
    assert torch.equal(weight.grad == 0, outside)
