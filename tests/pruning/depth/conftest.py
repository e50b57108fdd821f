"""A deep model as the artifact base/deep, and recipes that are run on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from stages.core.run import Run
from stages.model.checkpoint import finish_base
from stages.pruning.depth.depth import Depth
from tests import families
from tests.deep import deep
from tests.pipeline import NONE, download, params, record


@pytest.fixture
def source(workspace: Path) -> Callable[[nn.Module], nn.Module]:
    """Write a model as base/deep, with the text it is calibrated on."""

    def write(model: nn.Module) -> nn.Module:
        folder = Path("data/models/base/deep")
        model.save_pretrained(folder)
        families.tokenizer().save_pretrained(folder)
        finish_base("base/deep", folder, {"name": "deep"})
        download(params("llama", {}), "datasets/news")
        return model

    return write


@pytest.fixture
def graded(source: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Write a model of four blocks as base/deep, and a graded data set with six training items."""
    dataset = params("llama", {}).datasets["arithmetic"].model_copy(update={"train": 6})
    dataset.download("arithmetic")
    return source(deep("llama", 4))


@pytest.fixture
def prune() -> Callable[..., dict[str, Any]]:
    """Run a recipe, on base/deep unless it says otherwise, as prune/made, and return its record."""
    run = Run(device=families.DEVICE, dtype="float32", threads=1, seed=0, numerics="fast")

    def execute(artifact: str = "prune/made", **settings: Any) -> dict[str, Any]:
        recipe = {
            "source": "base/deep", "method": "depth", "metric": "reverse", "blocks": 2, "calibration": NONE,
        } | settings  # fmt: skip
        Depth(**recipe).execute(artifact, run)
        return record(artifact)

    return execute
