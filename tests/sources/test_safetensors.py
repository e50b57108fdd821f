"""A checkpoint in safetensors: what is refused before a weight is read."""

import json

import pytest
import torch

from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.sources.safetensors import Safetensors


@pytest.mark.parametrize("shard", ["../other.safetensors", "missing.safetensors", "deep/a.safetensors"])
def test_an_index_that_names_files_elsewhere_is_refused(shard, tmp_path):
    (tmp_path / "other.safetensors").write_bytes(b"")
    folder = tmp_path / "checkpoint"
    (folder / "deep").mkdir(parents=True)
    for file in ("a.safetensors", "deep/a.safetensors"):
        (folder / file).write_bytes(b"")
    (folder / "config.json").write_text("{}")
    index = {"weight_map": {"x": "a.safetensors", "y": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    source = Safetensors(
        source=f"path:{folder}", format="safetensors", sha256=sha256(folder), in_features=(32,)
    )
    with pytest.raises(Refusal, match=f"names '{shard}', which is no file of its folder; put all shards"):
        source.write(tmp_path / "out", torch.bfloat16)
