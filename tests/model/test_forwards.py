"""Forwards change no weight, and streamed blocks compute what loaded ones do."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from stages.compress import drift
from stages.compress.home import InMemory
from stages.core.run import Run
from stages.model.source import Empty, load_source
from tests import families, generators

RUN = Run(device=families.DEVICE, dtype="float32", threads=1, seed=0, numerics="fast")
NAMES = sorted({*families.ALL, *generators.NAMES})


def model_of(name: str) -> PreTrainedModel:
    return generators.model(name) if name in generators.NAMES else families.wide(name)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of base/tiny, to write a checkpoint into."""
    monkeypatch.chdir(tmp_path)
    return Path("data/models/base/tiny")


@pytest.mark.parametrize("name", NAMES)
def test_no_forward_changes_a_weight_that_is_saved(name, source):
    model_of(name).cpu().save_pretrained(source)
    model = load_source("base/tiny", RUN)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for training in (False, True, False):
        model.train(training)
        with torch.no_grad():
            model(input_ids=families.windows(2, 12), use_cache=False)
        after = model.state_dict()
        assert [key for key, tensor in before.items() if not torch.equal(after[key], tensor)] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_streamed_block_computes_what_a_loaded_one_does(name, source):
    model_of(name).cpu().save_pretrained(source)
    windows, empty = families.windows(2, 12), Empty("base/tiny", RUN)
    empty.bring_rest()
    streamed = drift.block_outputs(empty.model, windows, empty)
    loaded = drift.block_outputs(load_source("base/tiny", RUN), windows, InMemory())
    assert len(streamed) == len(loaded) > 0
    for mine, other in zip(streamed, loaded, strict=True):  # a halved weight is far from these
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
