"""Training recipes and what they train on, for tests that need no stage and no data set."""

from pathlib import Path
from typing import Any

import torch

from stages.corpus.examples import Examples
from stages.corpus.rows import Row, example
from stages.job.params import methods
from stages.recovery.arm import Finished
from stages.recovery.curve import Point
from stages.recovery.saves import Checkpoints
from stages.recovery.training import train
from stages.recovery.tuning import Tuning

TEXT = {"dataset": "news", "num_samples": 4, "sequence_length": 32, "held_out": 4}
LORA = {"rank": 4, "alpha": 8.0}


def recipe(method: str, **options: Any) -> Tuning:
    """Settings of a method that learns fast."""
    settings = {
        "source": "base/tiny", "method": method, "train": TEXT, "learning_rate": 0.01, "steps": 8,
        "batch_size": 4,
    } | (LORA if method == "lora" else {})  # fmt: skip
    return methods("finetune")[method].model_validate(settings | options)


def rows() -> list[Row]:
    """Text with something to learn: one short sequence over and over, in eight rows of 24."""
    windows = torch.arange(24).remainder(6).repeat(8, 1) + torch.arange(8).remainder(2)[:, None]
    return [(example(window),) for window in windows]


def tune(
    recipe: Tuning, model: torch.nn.Module, examples: Examples | None = None
) -> tuple[Finished, list[Point]]:
    """Train `model` by `recipe` on `rows()`; checkpoints go to the working folder."""
    arm = recipe.arm(model, None)
    examples = examples or Examples(rows(), rows()[:2])
    points = train("test", recipe, arm, examples, Checkpoints(Path("scratch/key"), recipe.checkpoint_every))
    return arm.finish(), points
