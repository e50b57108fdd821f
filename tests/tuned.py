"""Training recipes, their data and quantized models, for tests of training without stages or data sets."""

from pathlib import Path
from typing import Any

import torch

from stages.corpus.examples import Examples
from stages.corpus.rows import Row, example
from stages.job.params import methods
from stages.model.blocks import linears
from stages.model.grid import Integers, Quantized
from stages.recovery.arm import Arm, Recovered
from stages.recovery.curve import Point
from stages.recovery.grids import requantize_model
from stages.recovery.saves import Checkpoints
from stages.recovery.training import train
from stages.recovery.tuning import Tuning
from tests import families

TEXT = {"dataset": "news", "num_samples": 4, "sequence_length": 32, "held_out": 4}
LORA = {"rank": 4, "alpha": 8.0}


def recipe(method: str, **options: Any) -> Tuning:
    """Return settings of a method with which it learns fast."""
    settings = {
        "source": "base/tiny", "method": method, "train": TEXT, "learning_rate": 0.01, "steps": 8,
        "batch_size": 4,
    } | (LORA if method == "lora" else {})  # fmt: skip
    return methods("finetune")[method].model_validate(settings | options)


def windows() -> torch.Tensor:
    """Return text with something to learn, `[8, 24]`: one short sequence over and over."""
    text = torch.arange(24).remainder(6).repeat(8, 1) + torch.arange(8).remainder(2)[:, None]
    return text.to(families.DEVICE)


def rows() -> list[Row]:
    """Return the windows as rows."""
    return [(example(window),) for window in windows().cpu()]


def tune(
    recipe: Tuning, model: torch.nn.Module, examples: Examples | None = None
) -> tuple[Recovered, list[Point]]:
    """Train `model` by `recipe` on `rows()`; checkpoints go to the working folder."""
    arm = recipe.arm(model, None)
    points = run(recipe, arm, examples)
    return arm.finish(), points


def run(recipe: Tuning, arm: Arm, examples: Examples | None = None) -> list[Point]:
    """Train `arm` by `recipe` on `rows()`; checkpoints go to the working folder."""
    checkpoints = Checkpoints(Path("scratch/key"), recipe.checkpoint_every)
    return train("test", recipe, arm, examples or Examples(rows(), rows()[:2]), checkpoints)


def quantized(bits: int = 3) -> tuple[torch.nn.Module, dict[str, Quantized]]:
    """Return a tiny model on an asymmetric grid, and that grid."""
    model = families.model("llama").float()
    grid = {
        linear.name: Integers(bits, 16, symmetric=False).nearest(linear.weight) for linear in linears(model)
    }
    return model, requantize_model(grid, model)


def steps(arm: Arm, rate: float, count: int) -> list[float]:
    """Take `count` steps on the windows at a constant rate, without the loop, and return their losses."""
    losses = []
    for _ in range(count):
        loss = arm.model(input_ids=windows(), labels=windows()).loss
        loss.backward()
        if arm.masks:
            arm.masks.apply()
        arm.step(rate)
        arm.model.zero_grad()
        losses.append(loss.item())
    return losses


def values(arm: Arm) -> dict[str, torch.Tensor]:
    """Return copies of the weights in training, by name."""
    return {name: weight.detach().clone() for name, weight in arm.trained().items()}
