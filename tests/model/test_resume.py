"""Finished blocks are used only by a run with the same recipe, inputs and numerics."""

from pathlib import Path

import pytest

from tests.pipeline import altered, params, record
from tests.recipes import WANDA
from tests.streaming import counted, execute, files, killed_after_a_block, leftovers


def test_another_recipe_does_not_use_these_blocks(workspace, monkeypatch):
    killed_after_a_block(monkeypatch, WANDA)
    compressed = counted(monkeypatch)
    folder = execute(WANDA | {"sparsity": 0.25})
    assert len(compressed) == 14
    assert record("prune/made")["sparsity"] == 0.25
    assert not leftovers()
    first = files(folder)
    execute(WANDA | {"sparsity": 0.25})
    assert files(folder) == first


@pytest.mark.parametrize(
    "changed", ["models/base/tiny/model.safetensors", "datasets/news/calibration.parquet"]
)
def test_another_source_or_text_does_not_use_these_blocks(changed, workspace, monkeypatch):
    killed_after_a_block(monkeypatch, WANDA)
    chosen = params("llama", {"prune/made": {"source": "base/tiny", **WANDA}})
    altered(Path("data") / changed)
    compressed = counted(monkeypatch)
    chosen.prune["made"].execute("prune/made", chosen.run)
    assert len(compressed) == 14
    assert not leftovers()


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"threads": 2}])
def test_other_numerics_do_not_use_these_blocks(change, workspace, monkeypatch):
    killed_after_a_block(monkeypatch, WANDA)
    chosen = params("llama", {"prune/made": {"source": "base/tiny", **WANDA}})
    compressed = counted(monkeypatch)
    chosen.prune["made"].execute("prune/made", chosen.run.model_copy(update=change))
    assert len(compressed) == 14
