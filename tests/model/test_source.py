"""Sources: blocks have weights only while they are worked on, and damaged checkpoints are refused."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stages.core.errors import Refusal
from stages.core.files import MODELS
from stages.model import source
from stages.model.blocks import blocks
from stages.model.source import Empty
from tests import families
from tests.pipeline import do, load, params
from tests.project import sha256
from tests.recipes import MAGNITUDE, RTN, WANDA
from tests.streaming import SPOILED, UP, execute, leftovers, rewritten, spoil

WIDTH = {"method": "width", "importance": "ppm", "remove": 0.5}


def test_a_block_has_weights_only_while_it_is_held(workspace):
    chosen = params("llama", {})
    do(chosen)
    empty, plain = Empty("base/tiny", chosen.run), load("base/tiny").to(families.DEVICE)
    for name, block in blocks(empty.model):
        with empty.block(name, block) as done:
            assert not done
            for local, parameter in block.named_parameters():
                assert torch.equal(parameter, plain.get_parameter(f"{name}.{local}"))
        assert all(parameter.device.type == "meta" for parameter in block.parameters())
    assert not Path("data/scratch/resume").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gemma4"])  # gpt2 and gemma3 tie their heads
def test_no_embedding_is_in_memory_once_text_has_reached_the_blocks(family, workspace):
    chosen = params(family, {})
    do(chosen)
    empty, held = Empty("base/tiny", chosen.run), list[set[str]]()
    plain = load("base/tiny").to(families.DEVICE)
    names = {id(parameter): name for name, parameter in plain.named_parameters()}
    wide = {names[id(each.weight)] for each in plain.modules() if isinstance(each, torch.nn.Embedding)}

    def step(name: str, block: torch.nn.Module) -> Any:
        forward = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            with empty.block(name, block):
                held.append({n for n, p in empty.model.named_parameters() if not p.is_meta})
                return forward(*args, **kwargs)

        return run

    windows = families.windows(2, 24)
    outputs = []
    for name, block in blocks(empty.model):
        block.forward = step(name, block)
    for _ in range(2):
        empty.bring_rest()
        assert wide <= {n for n, p in empty.model.named_parameters() if not p.is_meta}
        with torch.no_grad():
            outputs.append(empty.model.base_model(input_ids=windows, use_cache=False).last_hidden_state)
    assert held and wide and not any(wide & names for names in held)
    with torch.no_grad():
        expected = plain.base_model(input_ids=windows, use_cache=False).last_hidden_state
    assert torch.equal(outputs[0], expected) and torch.equal(outputs[1], expected)


def test_a_source_of_another_dtype_is_read_in_the_runs(workspace):
    chosen = params("llama", {"prune/made": {"source": "base/tiny", **WANDA}})
    do(params("llama", {}))
    load("base/tiny").float().save_pretrained("data/models/base/tiny")
    chosen.prune["made"].execute("prune/made", chosen.run)
    stored = load_file("data/models/prune/made/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


@pytest.mark.parametrize("recipe", [MAGNITUDE, WIDTH])
@pytest.mark.parametrize("how", SPOILED)
def test_a_damaged_source_is_refused(how, recipe, workspace):
    do(params("llama", {}))
    spoil(Path("data/models/base/tiny"), how)
    with pytest.raises(Refusal, match=SPOILED[how]):
        execute({"calibration": {"dataset": "none"}, **recipe})
    assert not Path("data/models/prune/made").exists() and not leftovers()


@pytest.mark.parametrize("how", sorted(SPOILED.keys() - {"config"}))
def test_a_damaged_download_is_refused(how, workspace):
    shutil.copytree(Path("inputs/llama").resolve(), own := Path("own"))
    spoil(own, how)
    chosen = params("llama", {})
    base = {"source": "path:own", "sha256": sha256(own)}
    chosen.models["tiny"] = chosen.models["tiny"].model_copy(update=base)
    with pytest.raises(Refusal, match=SPOILED[how].replace("base/tiny", "path:own")):
        do(chosen)
    assert not Path("data/models/base/tiny").exists() and not leftovers()


def test_a_file_cut_after_it_was_opened_is_refused(workspace):
    chosen = params("llama", {})
    do(chosen)
    empty = Empty("base/tiny", chosen.run)
    spoil(MODELS / "base/tiny", "cut")
    name, block = blocks(empty.model)[1]
    with pytest.raises(Refusal, match=SPOILED["cut"]), empty.block(name, block):
        pass


def test_finished_blocks_stay_when_the_source_cannot_be_read(workspace, monkeypatch):
    chosen = params("llama", {"prune/made": {"source": "base/tiny", **MAGNITUDE}})
    do(chosen)
    whole = (MODELS / "prune/made/model.safetensors").read_bytes()
    shutil.rmtree(MODELS / "prune/made")
    tensor = source.Files._tensor

    def fail(self: source.Files, name: str) -> torch.Tensor:
        if name.startswith("model.layers.1."):
            raise OSError(errno.EIO, "Input/output error")
        return tensor(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(source.Files, "_tensor", fail)
        with pytest.raises(Refusal, match=r"base/tiny cannot be loaded \(OSError: \[Errno 5\]"):
            chosen.prune["made"].execute("prune/made", chosen.run)
    assert [file.name for file in leftovers() if file.suffix == ".json"] == ["00000.json"]
    chosen.prune["made"].execute("prune/made", chosen.run)
    assert (MODELS / "prune/made/model.safetensors").read_bytes() == whole and not leftovers()


PACKED: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "codes missing": lambda tensors: tensors.pop(f"{UP}_packed"),
    "codes short": lambda tensors: tensors.update({f"{UP}_packed": tensors[f"{UP}_packed"][:-1].clone()}),
    "scale missing": lambda tensors: tensors.pop(f"{UP}_scale"),
    "scale short": lambda tensors: tensors.update({f"{UP}_scale": tensors[f"{UP}_scale"][:-1].clone()}),
    "shape missing": lambda tensors: tensors.pop(f"{UP}_shape"),
    "shape wrong": lambda tensors: tensors.update({f"{UP}_shape": torch.tensor([64, 16])}),
}


@pytest.mark.parametrize("recipe", [MAGNITUDE, WIDTH])
@pytest.mark.parametrize("how", PACKED)
def test_a_damaged_packed_source_is_refused(how, recipe, workspace):
    packed = {"source": "base/tiny", **RTN}
    then = {"source": "quantize/packed", "calibration": {"dataset": "none"}, **recipe}
    do(params("llama", {"quantize/packed": packed}))
    rewritten(MODELS / "quantize/packed/model.safetensors", PACKED[how])
    chosen = params("llama", {"quantize/packed": packed, "prune/made": then})
    with pytest.raises(Refusal, match=r"^quantize/packed( cannot be loaded| lacks|:) "):
        chosen.prune["made"].execute("prune/made", chosen.run)
    assert not Path("data/models/prune/made").exists()


def test_a_mixture_with_an_expert_of_another_shape_is_refused(workspace):
    recipe = {"source": "base/tiny", **MAGNITUDE, "ignore": families.EXPERTS}
    chosen = params("llama", {"prune/made": recipe})
    do(params("llama", {}))
    families.mixture().save_pretrained(MODELS / "base/tiny")

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if ".experts." in name)
        tensors[name] = tensors[name][:-1].clone()

    rewritten(MODELS / "base/tiny/model.safetensors", shorten)
    with pytest.raises(Refusal, match=r"^base/tiny( cannot be loaded| lacks|:) "):
        chosen.prune["made"].execute("prune/made", chosen.run)
