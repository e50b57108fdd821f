"""Training on the source's grid: weights are on it after every step, and a resumed training ends the same."""

from typing import Any

import pytest
import torch

from tests import tuned
from tests.tuned import quantized, steps, values

pytestmark = [pytest.mark.numerics, pytest.mark.device]


def recipe(method: str, **options: Any) -> Any:
    return tuned.recipe(method, source="quantize/m", batch_size=1, **options)


RECIPES = [
    recipe("qat"), recipe("qat", keep="none"), recipe("eco"), recipe("eco", keep="none"),
    recipe("eco", optimizer="sgd", learning_rate=1.0),
]  # fmt: skip
IDS = [f"{r.method}-{r.keep}-{getattr(r, 'optimizer', '')}" for r in RECIPES]


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_weights_are_on_the_grid_after_every_step_and_learn(recipe):
    model, grid = quantized()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arm = recipe.arm(model, grid)
    zeros = {name: weight == 0 for name, weight in arm.trained().items()}
    losses, moved = [], False
    for _ in range(30):
        losses += steps(arm, recipe.learning_rate, 1)
        for name, weight in values(arm).items():
            assert torch.equal(grid[name].requantize(weight).dequantize(), weight)
            assert recipe.keep == "none" or not weight[zeros[name]].any()
            moved |= recipe.keep == "none" and bool(weight[zeros[name]].any())
    assert losses[-1] < losses[0] - 0.05
    assert moved == (recipe.keep == "none")
    recovered = arm.finish()
    assert recovered.codes.keys() == grid.keys()
    assert recovered.zeros.keys() == (grid.keys() if recipe.keep == "mask" else set())
    for name, code in recovered.codes.items():
        assert torch.equal(code.dequantize(), recovered.model.get_parameter(f"{name}.weight"))
        assert torch.equal(code.scale, grid[name].scale)
        assert torch.equal(code.zero_point, grid[name].zero_point)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed and {name.removesuffix(".weight") for name in changed} <= grid.keys()


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_training_resumes_bit_for_bit(recipe):
    arms = [recipe.arm(*quantized()) for _ in range(2)]
    steps(arms[0], recipe.learning_rate, 6)
    state = {name: tensor.clone() for name, tensor in arms[0].state().items()}
    arms[1].load(state)
    for arm in arms:
        steps(arm, recipe.learning_rate, 6)
    ends = [arm.state() for arm in arms]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert all(torch.equal(weight, values(arms[1])[name]) for name, weight in values(arms[0]).items())


@pytest.mark.parametrize("method", ["qat", "eco"])
def test_ignored_linears_keep_their_codes(method):
    model, grid = quantized()
    before = {name: code.dequantize() for name, code in grid.items()}
    arm = recipe(method, ignore=("mlp.up_proj",)).arm(model, grid)
    steps(arm, 0.05, 5)
    assert not any("up_proj" in name for name in arm.trained())
    for name, code in arm.finish().codes.items():
        assert torch.equal(code.dequantize(), before[name]) == ("up_proj" in name)
