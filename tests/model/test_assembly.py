"""Checkpoints of several files: a shard per block and an index, with the tensors of a single file."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from stages.model import assembly, stream
from stages.model.blocks import blocks
from tests import families
from tests.pipeline import load, record
from tests.recipes import WANDA
from tests.streaming import RECIPES, Killed, counted, execute, files, leftovers


def outputs(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The weights of a model, packed ones unpacked by a forward, and its logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.arange(16)[None]).logits
    return [*model.named_parameters(), ("logits", logits)]


@pytest.mark.parametrize("family", families.CONFIGS)
@pytest.mark.parametrize("recipe", ["wanda", "gptq"])
def test_a_large_checkpoint_has_a_file_per_block(recipe, family, workspace, monkeypatch):
    section, settings = RECIPES[recipe]
    folder = execute(settings, section, family)
    whole = {name: tensor.clone() for name, tensor in outputs(load(f"{section}/made"))}
    stored = load_file(folder / "model.safetensors")
    monkeypatch.setattr(assembly, "ONE_FILE", 1000)
    execute(settings, section, family)

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    parts = sorted(file.name for file in folder.glob("*.safetensors"))
    assert not (folder / "model.safetensors").exists()
    assert sorted(set(index["weight_map"].values())) == parts
    tensors = {}
    for part in parts:
        with safe_open(folder / part, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
        tensors |= {name: (part, tensor) for name, tensor in load_file(folder / part).items()}
    assert {name: part for name, (part, _) in tensors.items()} == index["weight_map"]
    assert tensors.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, (_, tensor) in tensors.items())
    model = load(f"{section}/made")
    for block, _ in blocks(model):
        assert len({part for name, (part, _) in tensors.items() if name.startswith(f"{block}.")}) == 1
    assert record(f"{section}/made")["bytes_on_disk"] == sum((folder / part).stat().st_size for part in parts)
    for name, parameter in outputs(model):
        assert torch.equal(parameter, whole[name]), name
    assert not leftovers()


def test_a_run_killed_during_assembly_resumes(workspace, monkeypatch):
    folder = execute(WANDA)
    expected = files(folder)

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stream, "lineage", kill)
        execute(WANDA)
    assert files(folder) == expected
    compressed = counted(monkeypatch)
    execute(WANDA)
    assert not compressed
    assert files(folder) == expected
    assert not leftovers()
