"""Streaming: the bytes are those of a model changed in memory, and a killed run goes on where it was."""

import errno
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from stages.compress.method import WeightMethod
from stages.compress.walk import walk
from stages.core.errors import Refusal
from stages.core.files import MODELS
from stages.core.run import Run
from stages.corpus import generation
from stages.corpus.windows import calibration_windows
from stages.model import checkpoint, source, stream
from stages.model.artifact import load_model, load_tokenizer
from stages.model.blocks import blocks, linears
from stages.model.source import Empty
from stages.pruning.magnitude import Magnitude
from stages.pruning.pruner import Pruner
from stages.pruning.wanda import Wanda
from stages.quantization.quantizer import Quantizer
from tests import families
from tests.pipeline import NONE, TEXT, altered, dense, do, load, params, record
from tests.project import sha256
from tests.families import mixture
from tests.recipes import GPTQ, MAGNITUDE, RTN, SPARSEGPT, WANDA

@pytest.mark.parametrize("family", families.CONFIGS)
@pytest.mark.parametrize("method", PRUNE)
def test_the_bytes_are_those_of_a_model_in_memory(method, family, workspace):
    folder = made(PRUNE[method], family=family)
    chosen = params(family, {"prune/made": {"source": "base/tiny", **PRUNE[method]}})
    recipe: Any = chosen.prune["made"]
    chosen.run.start()
    model = load_model("base/tiny", chosen.run, dequantize=True)
    plan = recipe.plan(Empty("base/tiny", chosen.run), pytest.fail)
    windows = None
    if recipe.statistic:
        windows = calibration_windows(load_tokenizer("base/tiny"), recipe.calibration, families.VOCAB)
    walk(
        model,
        lambda linear, statistic: recipe.replace(linear, statistic, plan),
        windows=windows,
        statistic=recipe.statistic,
    )
    checkpoint.save("prune/memory", model, recipe.model_dump(mode="json"), chosen.run)

    streamed, memory = files(folder), files(folder.parent / "memory")
    assert streamed.keys() == memory.keys()
    for name in streamed.keys() - {"artifact.json", "model.safetensors"}:
        assert streamed[name] == memory[name], name
    told, other = record("prune/made"), record("prune/memory")
    for key in ("sparsity", "bits_per_weight", "bytes_ideal", "num_parameters", "layout"):
        assert told[key] == other[key], key
    ours, theirs = (load_file(folder.parent / n / "model.safetensors") for n in ("made", "memory"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert streamed["model.safetensors"] == memory["model.safetensors"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_run_goes_on_to_the_same_bytes(recipe, family, workspace, monkeypatch):
    section, options = RECIPES[recipe]
    folder = made(options, section, family)
    never = files(folder)
    base = load("base/tiny")
    first, second = ([x.name for x in linears(base) if x.block == b] for b, _ in blocks(base))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        compressed = counted(patch, kill_at=len(first) + 1)
        made(options, section, family)
    assert len(compressed) == len(first) + 1
    assert files(folder) == never, "what was there stays until the new one is whole"
    assert [file.suffix for file in sorted(leftovers())] == [".json", ".safetensors"]

    compressed = counted(monkeypatch)
    made(options, section, family)
    assert sorted(compressed) == sorted(second)
    assert files(folder) == never
    assert not leftovers()


def test_going_on_is_logged(workspace, monkeypatch, caplog):
    killed_after_a_block(monkeypatch, WANDA)
    logging.disable(logging.NOTSET)
    with caplog.at_level(logging.INFO):
        made(WANDA)
    assert "prune/made goes on: 1 of 2 blocks were finished before" in caplog.text


@pytest.mark.parametrize("sequential", ["linear", "block", "none"])
def test_no_more_than_one_block_has_weights(sequential, workspace, monkeypatch):
    held: list[set[str]] = []
    honest = Wanda.weights
    do(params("llama", {}))
    home: list[stream.Streamed] = []
    start = stream.Streamed.__init__

    def started(self: stream.Streamed, *args: Any) -> None:
        start(self, *args)
        home.append(self)

    def weights(self: Wanda, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        held.append({n for n, b in blocks(home[0].model) for p in b.parameters() if p.device.type != "meta"})
        return honest(self, weight, *rest)

    monkeypatch.setattr(stream.Streamed, "__init__", started)
    monkeypatch.setattr(Wanda, "weights", weights)
    made(WANDA | {"calibration": TEXT | {"sequential": sequential}})
    assert len(held) == 14
    assert [sorted(names) for names in held] == [["model.layers.0"]] * 7 + [["model.layers.1"]] * 7
    assert all(p.device.type == "meta" for _, b in blocks(home[0].model) for p in b.parameters())


def test_buffers_that_a_checkpoint_holds_are_read_and_written(workspace, monkeypatch):
    """No family here has one; a scale of a block or an embedding that is not trained would be."""
    from transformers.models.llama import modeling_llama as llama

    honest = llama.LlamaRMSNorm.__init__

    def scaled(self: Any, *args: Any, **options: Any) -> None:
        honest(self, *args, **options)
        self.register_buffer("scale", torch.ones(3))

    monkeypatch.setattr(llama.LlamaRMSNorm, "__init__", scaled)
    chosen = params("llama", {"prune/made": {"source": "base/tiny", **WANDA}})
    do(params("llama", {}))
    model = load("base/tiny")
    for number, (_, buffer) in enumerate(model.named_buffers()):
        if buffer.shape == (3,):
            buffer.fill_(number)
    model.save_pretrained("data/models/base/tiny")
    chosen.prune["made"].execute("prune/made", chosen.run)
    found = {name: buffer for name, buffer in model.named_buffers() if buffer.shape == (3,)}
    assert len(found) == 5
    again = dict(load("prune/made").named_buffers())
    for name, buffer in found.items():
        assert torch.equal(again[name], buffer), name


@pytest.mark.parametrize("broken", ["nan", "inf"])
@pytest.mark.parametrize("recipe", ["magnitude", "wanda", "joint", "rtn", "gptq"])
def test_broken_weights_are_refused_by_name_and_nothing_is_written(recipe, broken, workspace):
    section, options = RECIPES[recipe]
    chosen = params("llama", {f"{section}/made": {"source": "base/tiny", **options}})
    do(params("llama", {}))
    model = load("base/tiny")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float(broken)
    model.save_pretrained("data/models/base/tiny")
    with pytest.raises(
        Refusal, match=r"base/tiny: NaN or infinite values in model\.layers\.1\.mlp\.up_proj\.weight;"
    ):
        getattr(chosen, section)["made"].execute(f"{section}/made", chosen.run)
    assert not (Path("data/models") / section / "made").exists()
    assert not leftovers()


@pytest.mark.parametrize("broken", ["nan", "inf"])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("recipe", ["magnitude", "wanda", "rtn"])
def test_what_is_broken_outside_the_blocks_is_refused_before_any_work(
    recipe, name, broken, workspace, monkeypatch
):
    section, options = RECIPES[recipe]
    chosen = params("mistral", {f"{section}/made": {"source": "base/tiny", **options}})
    do(params("mistral", {}))
    model = load("base/tiny")
    model.get_parameter(name).data.view(-1)[5] = float(broken)
    model.save_pretrained("data/models/base/tiny")
    compressed = counted(monkeypatch)
    with pytest.raises(Refusal, match=rf"^base/tiny: NaN or infinite values in {name}; nothing was written"):
        getattr(chosen, section)["made"].execute(f"{section}/made", chosen.run)
    assert not compressed
    assert not (Path("data/models") / section / "made").exists()
    assert not leftovers()


@pytest.mark.parametrize("sequential", ["linear", "block", "none"])
def test_a_refusal_leaves_no_finished_blocks(sequential, workspace, monkeypatch):
    options = WANDA | {"calibration": TEXT | {"sequential": sequential}}
    killed_after_a_block(monkeypatch, options)

    def refused(*_: Any) -> torch.Tensor:
        raise Refusal("it is not liked.")

    said = r"^model\.layers\.1\..*: it is not liked"
    with monkeypatch.context() as patch, pytest.raises(Refusal, match=said):
        patch.setattr(Wanda, "weights", refused)
        made(options)
    assert not list(Path("data/scratch/resume").rglob("*"))
    compressed = counted(monkeypatch)
    made(options)
    assert len(compressed) == 14


def test_tensors_that_are_put_together_when_loaded_are_not_taken_for_the_parameter(tmp_path, monkeypatch):
    """A mixture's experts lie apart on disk and together in the model."""
    monkeypatch.chdir(tmp_path)
    folder = MODELS / "base/tiny"
    config = MixtralConfig(**families._GATED, num_local_experts=4, num_experts_per_tok=1)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    made.save_pretrained(folder)
    families.tokenizer().save_pretrained(folder)
    (folder / "artifact.json").write_text(json.dumps({"lineage": ["base/tiny"], "recipes": {}, "base": {}}))
    Path("data/datasets/none").mkdir(parents=True)
    recipe = Magnitude(
        method="magnitude", source="base/tiny", sparsity=0.5, scope="matrix", ignore=EXPERTS,
        calibration={"dataset": "none"},
    )  # fmt: skip
    recipe.execute("prune/made", Run(device="cpu", dtype="bfloat16", threads=1, seed=0))
    again = AutoModelForCausalLM.from_pretrained(MODELS / "prune/made")
    for name, parameter in made.named_parameters():
        if any(expert in name for expert in EXPERTS):
            assert torch.equal(again.get_parameter(name), parameter), name
    assert json.loads((MODELS / "prune/made/artifact.json").read_text())["sparsity"] == 0.5


def test_a_nan_outside_the_linears_is_refused_by_name(workspace):
    do(params("llama", {}))
    model = load("base/tiny")
    model.model.layers[1].input_layernorm.weight.data[3] = torch.nan
    model.save_pretrained("data/models/base/tiny")
    with pytest.raises(Refusal, match=r"model\.layers\.1\.input_layernorm\.weight"):
        made(MAGNITUDE)
    assert not (MODELS / "prune/made").exists()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_where_one_block_cannot_be_packed_none_is(family, workspace, monkeypatch):
    """As with 4-bit zero points of at most 8 outputs, which only some blocks may have."""
    made(RTN, "quantize", family)
    whole = dense(load("quantize/made")).state_dict()
    filled, unserved, packable = stream.Streamed._fill, set(), stream.packable

    def fill(self: stream.Streamed, name: str, module: torch.nn.Module, **options: Any) -> None:
        unserved.update(module.modules() if name.endswith(".1") else [])
        filled(self, name, module, **options)

    monkeypatch.setattr(stream.Streamed, "_fill", fill)
    monkeypatch.setattr(stream, "packable", lambda one, code: one not in unserved and packable(one, code))
    folder = made(RTN, "quantize", family)
    assert record("quantize/made")["layout"] == "fake_quantized"
    source, written = (load_file(at / "model.safetensors") for at in (MODELS / "base/tiny", folder))
    assert {name: one.shape for name, one in written.items()} == {n: one.shape for n, one in source.items()}
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    found = load("quantize/made").state_dict()
    assert unserved and set(found) <= set(whole)
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, whole[name]), name
