"""Streaming: the bytes are those of a model changed in memory, and a killed run resumes."""

import errno
import json
import logging
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stages.compress.walk import walk
from stages.core.errors import Refusal
from stages.core.files import MODELS, checksum
from stages.core.run import Run
from stages.corpus.windows import calibration_windows
from stages.model import checkpoint, source, stream
from stages.model.artifact import load_model, load_tokenizer
from stages.model.blocks import blocks, linears
from stages.model.source import Empty, Files
from stages.pruning.magnitude import Magnitude
from stages.pruning.wanda import Wanda
from tests import families
from tests.pipeline import TEXT, dense, do, load, params, record
from tests.recipes import MAGNITUDE, RTN, WANDA
from tests.streaming import PRUNE, RECIPES, Killed, counted, execute, files, killed_after_a_block, leftovers

pytestmark = pytest.mark.device


@pytest.mark.parametrize("family", families.CONFIGS)
@pytest.mark.parametrize("method", PRUNE)
def test_the_bytes_are_those_of_a_model_in_memory(method, family, workspace):
    folder = execute(PRUNE[method], family=family)
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
        lambda linears, statistic: recipe.replace_group(linears, statistic, plan),
        by_group=True,
        windows=windows,
        statistic=recipe.statistic,
    )
    checkpoint.save("prune/memory", model, recipe, chosen.run)

    streamed, memory = files(folder), files(folder.parent / "memory")
    assert streamed.keys() == memory.keys()
    for name in streamed.keys() - {"artifact.json", "model.safetensors"}:
        assert streamed[name] == memory[name], name
    for key in (
        "sparsity",
        "sparsity_by_block",
        "bits_per_weight",
        "bytes_ideal",
        "num_parameters",
        "layout",
    ):
        assert record("prune/made")[key] == record("prune/memory")[key], key
    assert streamed["model.safetensors"] == memory["model.safetensors"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_run_resumes_to_the_same_bytes(recipe, family, workspace, monkeypatch):
    section, settings = RECIPES[recipe]
    folder = execute(settings, section, family)
    expected = files(folder)
    base = load("base/tiny")
    first, second = (
        [linear.name for linear in linears(base) if linear.block == block] for block, _ in blocks(base)
    )
    with monkeypatch.context() as patch, pytest.raises(Killed):
        compressed = counted(patch, kill_at=len(first) + 1)
        execute(settings, section, family)
    assert len(compressed) == len(first) + 1
    assert files(folder) == expected, "the old artifact stays until the new one is whole"
    assert [file.suffix for file in sorted(leftovers())] == [".json", ".safetensors"]

    compressed = counted(monkeypatch)
    execute(settings, section, family)
    assert sorted(compressed) == sorted(second)
    assert files(folder) == expected
    assert not leftovers()


def test_resuming_is_logged(workspace, monkeypatch, caplog):
    killed_after_a_block(monkeypatch, WANDA)
    logging.disable(logging.NOTSET)
    with caplog.at_level(logging.INFO):
        execute(WANDA)
    assert "prune/made resumes: 1 of 2 blocks are finished" in caplog.text


@pytest.mark.parametrize("sequential", ["linear", "block", "none"])
def test_no_more_than_one_block_has_weights(sequential, workspace, monkeypatch):
    snapshots: list[list[str]] = []
    streamed: list[stream.Streamed] = []
    weights, start = Wanda.weights, stream.Streamed.__init__

    def holding() -> list[str]:
        return [
            name
            for name, block in blocks(streamed[0].model)
            if any(parameter.device.type != "meta" for parameter in block.parameters())
        ]

    def keep(self: stream.Streamed, *args: Any) -> None:
        start(self, *args)
        streamed.append(self)

    def watch(self: Wanda, *args: Any) -> Any:
        snapshots.append(holding())
        return weights(self, *args)

    monkeypatch.setattr(stream.Streamed, "__init__", keep)
    monkeypatch.setattr(Wanda, "weights", watch)
    execute(WANDA | {"calibration": TEXT | {"sequential": sequential}})
    assert snapshots == [["model.layers.0"]] * 7 + [["model.layers.1"]] * 7
    assert holding() == []


def test_stored_buffers_are_read_and_written(workspace, monkeypatch):
    """No family here stores buffers; others may store scales that are not trained."""
    from transformers.models.llama import modeling_llama as llama

    original = llama.LlamaRMSNorm.__init__

    def scaled(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        self.register_buffer("scale", torch.ones(3))

    do(params("llama", {}))
    monkeypatch.setattr(llama.LlamaRMSNorm, "__init__", scaled)
    chosen = params("llama", {"prune/made": {"source": "base/tiny", **WANDA}})
    model = load("base/tiny")  # its files lack the buffers, so these hold anything until they are filled
    for number, (_, buffer) in enumerate(model.named_buffers()):
        if buffer.shape == (3,):
            buffer.fill_(number)
    model.save_pretrained("data/models/base/tiny")
    chosen.prune["made"].execute("prune/made", chosen.run)
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.shape == (3,)}
    assert len(buffers) == 5
    pruned = dict(load("prune/made").named_buffers())
    for name, buffer in buffers.items():
        assert torch.equal(pruned[name], buffer), name


def test_a_write_that_fails_stops_the_run_and_keeps_finished_blocks(workspace, monkeypatch):
    expected = files(execute(MAGNITUDE))
    save = stream.save_file

    def full(tensors: dict[str, torch.Tensor], file: Path, **options: Any) -> None:
        save(tensors, file, **options)
        if any(name.startswith("model.layers.1.") for name in tensors):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(stream, "save_file", full)
        execute(MAGNITUDE | {"sparsity": 0.25})
    assert files(MODELS / "prune/made") == expected
    assert [file.name for file in sorted(leftovers())] == ["00000.json", "00000.safetensors"]
    compressed = counted(monkeypatch)
    execute(MAGNITUDE | {"sparsity": 0.25})
    assert len(compressed) == 7 and not leftovers()


def test_a_refusal_waits_for_the_block_being_written(workspace, monkeypatch):
    """Otherwise that block would be finished after all were deleted."""
    save, entered, weights = stream.Streamed._save, threading.Event(), Magnitude.weights

    def slow(*args: Any) -> None:
        assert entered.wait(60)
        time.sleep(0.2)
        save(*args)

    def refuse(self: Magnitude, *args: Any) -> torch.Tensor:
        if (MODELS / "prune/made").exists() or len(compressed) <= 7:
            return weights(self, *args)
        entered.set()
        raise Refusal("no such thing.")

    compressed = counted(monkeypatch)
    monkeypatch.setattr(stream.Streamed, "_save", slow)
    monkeypatch.setattr(Magnitude, "weights", refuse)
    with pytest.raises(Refusal, match="no such thing"):
        execute(MAGNITUDE)
    time.sleep(0.5)
    assert len(compressed) == 8 and not leftovers()


def rebuild(count: int) -> None:
    """Replace `base/tiny` by a model with so many blocks."""
    do(params("llama", {}))
    model = load("base/tiny")
    changed = {"num_hidden_layers": count, "layer_types": None}
    config = type(model.config).from_dict(model.config.to_dict() | changed)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(MODELS / "base/tiny")


def test_the_last_block_is_finished_before_errors_are_measured(workspace, monkeypatch):
    """Measuring goes through all blocks again."""
    rebuild(1)
    save = stream.Streamed._save

    def slow(*args: Any) -> None:
        time.sleep(0.5)
        save(*args)

    monkeypatch.setattr(stream.Streamed, "_save", slow)
    compressed = counted(monkeypatch)
    execute(WANDA)
    assert len(compressed) == 7
    assert len(record("prune/made")["notes"]["prune/made"]["block_errors"]["errors"]) == 1


@pytest.mark.parametrize("behind", [1, 2])
def test_the_next_block_is_read_while_this_one_is_compressed(behind, workspace, monkeypatch):
    """At most one block is ahead and, on a CPU, one behind, so three are in memory."""
    monkeypatch.setattr(stream, "WRITERS", dict.fromkeys(stream.WRITERS, behind))
    rebuild(6)
    events, saved, held = [threading.Event() for _ in range(6)], set[int](), list[set[int]]()
    read, save, weights = Files._tensor, stream.Streamed._save, Magnitude.weights

    def watch(self: Files, name: str) -> torch.Tensor:
        tensor = read(self, name)
        if match := re.fullmatch(r"model\.layers\.(\d)\.post_attention_layernorm.weight", name):
            events[int(match[1])].set()  # the last of its block
        return tensor

    def slow(self: stream.Streamed, name: str, *args: Any) -> None:
        time.sleep(0.05)
        save(self, name, *args)
        saved.add(int(name[-1]))

    def compress(self: Magnitude, *args: Any) -> torch.Tensor:
        block = len(held) // 7
        assert all(event.wait(60) for event in events[block : block + 2]), "the next block is read now"
        held.append({number for number, event in enumerate(events) if event.is_set()} - saved)
        return weights(self, *args)

    monkeypatch.setattr(Files, "_tensor", watch)
    monkeypatch.setattr(stream.Streamed, "_save", slow)
    monkeypatch.setattr(Magnitude, "weights", compress)
    execute(MAGNITUDE)
    assert len(held) == 42 and saved == set(range(6))
    for number, blocks_held in enumerate(held):
        block = number // 7
        assert {block, min(block + 1, 5)} <= blocks_held <= set(range(block - behind, block + 2))


def test_a_block_is_written_while_the_one_before_is_checked(workspace, monkeypatch):
    """Killed then, the run keeps the later block and ends with the same bytes."""
    monkeypatch.setattr(stream, "WRITERS", dict.fromkeys(stream.WRITERS, 2))
    rebuild(3)
    expected = files(execute(WANDA))
    check, written, checked = stream.check_written, threading.Event(), []

    def first_waits(file: Path, tensors: dict[str, torch.Tensor]) -> str:
        if "model.layers.0.mlp.up_proj.weight" in tensors:
            assert written.wait(60), "the next block is written meanwhile"
            raise Killed
        result = check(file, tensors)
        checked.append(file.name)
        written.set()
        return result

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stream, "check_written", first_waits)
        execute(WANDA)
    assert {file.name for file in leftovers()} >= {"00001.json", "00001.safetensors"}
    assert "00000.json" not in {file.name for file in leftovers()}

    compressed = counted(monkeypatch)
    assert files(execute(WANDA)) == expected
    assert compressed[:7] == [name for name in compressed if name.startswith("model.layers.0.")]
    assert not any(name.startswith("model.layers.1.") for name in compressed) and not leftovers()


def test_codes_that_change_in_packing_are_detected(workspace, monkeypatch):
    packed = stream.tensors_of

    def spoiled(linear: str, code: Any) -> dict[str, torch.Tensor]:
        tensors = packed(linear, code)
        tensors[f"{linear}.weight_packed"].view(-1)[3] ^= 1
        return tensors

    monkeypatch.setattr(stream, "tensors_of", spoiled)
    with pytest.raises(
        AssertionError, match=r"model\.layers\.0\.self_attn\.\w+: the codes to be written differ"
    ):
        execute(RTN, "quantize")
    assert not (MODELS / "quantize/made").exists() and not leftovers()


def test_zeros_that_a_method_loses_are_detected(workspace, monkeypatch):
    execute(MAGNITUDE)
    recipes = {"made": "base/tiny", "again": "prune/made"}
    chosen = params("llama", {f"prune/{n}": {"source": source, **MAGNITUDE} for n, source in recipes.items()})
    monkeypatch.setattr(Magnitude, "weights", lambda self, weight, *_: weight + 1)
    with pytest.raises(AssertionError, match=r"model\.layers\.0\..* zeros were lost"):
        chosen.prune["again"].execute("prune/again", chosen.run)
    assert not (MODELS / "prune/again").exists() and not leftovers()


@pytest.mark.parametrize("change", [lambda t: t.neg_(), lambda t: t.view(-1)[5:6].add_(1), lambda t: t.t_()])
def test_a_file_that_differs_from_its_tensors_is_detected(change, tmp_path):
    tensors = {name: torch.randn(8, 8).to(torch.bfloat16) for name in ("a", "b")} | {"n": torch.tensor(3)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert stream.check_written(tmp_path / "x.safetensors", tensors) == checksum(tmp_path / "x.safetensors")
    for other in ({"a": tensors["a"]}, tensors | {"c": tensors["n"]}, tensors | {"a": tensors["a"][:4]}):
        with pytest.raises(AssertionError, match="differs from the tensors"):
            stream.check_written(tmp_path / "x.safetensors", other)
    change(tensors["b"])
    with pytest.raises(AssertionError, match="differs from the tensors"):
        stream.check_written(tmp_path / "x.safetensors", {n: t.contiguous() for n, t in tensors.items()})


@pytest.mark.parametrize("broken", ["nan", "inf"])
@pytest.mark.parametrize("recipe", ["magnitude", "wanda", "joint", "rtn", "gptq"])
def test_broken_weights_are_refused_by_name_and_nothing_is_written(recipe, broken, workspace):
    section, settings = RECIPES[recipe]
    do(params("llama", {}))
    model = load("base/tiny")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float(broken)
    model.save_pretrained("data/models/base/tiny")
    with pytest.raises(
        Refusal, match=r"base/tiny: NaN or infinite values in model\.layers\.1\.mlp\.up_proj\.weight;"
    ):
        execute(settings, section)
    assert not (Path("data/models") / section / "made").exists()
    assert not leftovers()


@pytest.mark.parametrize("broken", ["nan", "inf"])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("recipe", ["magnitude", "wanda", "rtn"])
def test_broken_weights_outside_blocks_are_refused_before_any_work(
    recipe, name, broken, workspace, monkeypatch
):
    section, settings = RECIPES[recipe]
    do(params("mistral", {}))
    model = load("base/tiny")
    model.get_parameter(name).data.view(-1)[5] = float(broken)
    model.save_pretrained("data/models/base/tiny")
    compressed = counted(monkeypatch)
    with pytest.raises(Refusal, match=rf"^base/tiny: NaN or infinite values in {name}; nothing was written"):
        execute(settings, section, "mistral")
    assert not compressed
    assert not (Path("data/models") / section / "made").exists()
    assert not leftovers()


@pytest.mark.parametrize("sequential", ["linear", "block", "none"])
def test_a_refusal_leaves_no_finished_blocks(sequential, workspace, monkeypatch):
    recipe = WANDA | {"calibration": TEXT | {"sequential": sequential}}
    killed_after_a_block(monkeypatch, recipe)

    def refuse(*_: Any) -> torch.Tensor:
        raise Refusal("no such thing.")

    with (
        monkeypatch.context() as patch,
        pytest.raises(Refusal, match=r"^model\.layers\.1\..*: no such thing"),
    ):
        patch.setattr(Wanda, "weights", refuse)
        execute(recipe)
    assert not list(Path("data/scratch/resume").rglob("*"))
    compressed = counted(monkeypatch)
    execute(recipe)
    assert len(compressed) == 14


def test_the_experts_of_a_mixture_are_kept(tmp_path, monkeypatch):
    """Experts are separate tensors on disk and one parameter in the model."""
    monkeypatch.chdir(tmp_path)
    folder = MODELS / "base/tiny"
    model = families.mixture(experts=4)
    model.save_pretrained(folder)
    families.tokenizer().save_pretrained(folder)
    (folder / "artifact.json").write_text(json.dumps({"lineage": ["base/tiny"], "recipes": {}, "base": {}}))
    Path("data/datasets/none").mkdir(parents=True)
    recipe = Magnitude(
        method="magnitude", source="base/tiny", sparsity=0.5, scope="matrix", ignore=families.EXPERTS,
        calibration={"dataset": "none"},
    )  # fmt: skip
    loaded, load = [], source.load_source
    monkeypatch.setattr(source, "load_source", lambda name, run: loaded.append(run.device) or load(name, run))
    recipe.execute("prune/made", Run(device="auto", dtype="bfloat16", threads=1, seed=0, numerics="fast"))
    assert loaded == ["cpu"], "a card holds a block at a time"
    pruned = AutoModelForCausalLM.from_pretrained(MODELS / "prune/made")
    for name, parameter in model.named_parameters():
        if name.endswith(families.EXPERTS):
            assert torch.equal(pruned.get_parameter(name), parameter.cpu()), name
    assert record("prune/made")["sparsity"] == 0.5


def test_a_nan_outside_the_linears_is_refused_by_name(workspace):
    do(params("llama", {}))
    model = load("base/tiny")
    model.model.layers[1].input_layernorm.weight.data[3] = torch.nan
    model.save_pretrained("data/models/base/tiny")
    with pytest.raises(Refusal, match=r"model\.layers\.1\.input_layernorm\.weight"):
        execute(MAGNITUDE)
    assert not (MODELS / "prune/made").exists()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_if_one_block_cannot_be_packed_none_is(family, workspace, monkeypatch):
    """Only some blocks may have, say, 4-bit zero points of at most 8 outputs."""
    execute(RTN, "quantize", family)
    packed = dense(load("quantize/made")).state_dict()
    model = load("base/tiny")
    first = iter([linear for linear in linears(model) if linear.block == blocks(model)[0][0]])
    packable = stream.packable
    monkeypatch.setattr(
        stream, "packable", lambda module, code: next(first, None) is not None and packable(module, code)
    )
    folder = execute(RTN, "quantize", family)
    assert next(first, None) is None
    assert record("quantize/made")["layout"] == "fake_quantized"
    source, written = (load_file(at / "model.safetensors") for at in (MODELS / "base/tiny", folder))
    assert {name: t.shape for name, t in written.items()} == {name: t.shape for name, t in source.items()}
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    stored = load("quantize/made").state_dict()
    assert set(stored) <= set(packed)
    for name, tensor in stored.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, packed[name]), name
