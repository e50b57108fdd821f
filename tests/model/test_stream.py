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

PRUNE = {"magnitude": MAGNITUDE, "wanda": WANDA, "sparsegpt": SPARSEGPT}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("prune", MAGNITUDE),
    "wanda": ("prune", WANDA),
    "wanda-none": ("prune", WANDA | {"calibration": TEXT | {"sequential": "none"}}),
    "wanda-block": ("prune", WANDA | {"calibration": TEXT | {"sequential": "block", "batch_size": 2}}),
    "owl": ("prune", SPARSEGPT | {"allocation": {"kind": "owl", "multiple": 2.0}}),
    "joint": ("prune", SPARSEGPT | {"grid": {"bits": 4, "group_size": 32}}),
    "rtn": ("quantize", RTN),
    "gptq": ("quantize", GPTQ),
}


class Killed(BaseException):
    """What a signal raises."""


def made(recipe: dict[str, Any], section: str = "prune", family: str = "llama") -> Path:
    """The folder of the one recipe, made from `base/tiny`."""
    if not Path("data/models/base/tiny").exists():
        do(params(family, {}))
    chosen = params(family, {f"{section}/made": {"source": "base/tiny", **recipe}})
    chosen.run.start()
    getattr(chosen, section)["made"].execute(f"{section}/made", chosen.run)
    return Path("data/models") / section / "made"


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def leftovers() -> list[Path]:
    return [file for file in Path("data/scratch").rglob("*") if file.is_file()]


def counted(monkeypatch: pytest.MonkeyPatch, kill_at: int | None = None) -> list[str]:
    """Watch which linears are compressed; be killed in the middle of the one numbered `kill_at`."""
    names: list[str] = []

    def watch(cls: type[WeightMethod]) -> Callable[..., Any]:
        honest = cls.replace

        def replace(self: WeightMethod, linear: Any, statistic: Any, plan: Any) -> Any:
            if len(names) == kill_at:
                raise Killed
            names.append(linear.name)
            return honest(self, linear, statistic, plan)

        return replace

    for cls in (Pruner, Quantizer):
        monkeypatch.setattr(cls, "replace", watch(cls))
    return names


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


@pytest.mark.parametrize("family", families.CONFIGS)
@pytest.mark.parametrize("recipe", ["wanda", "gptq"])
def test_a_large_checkpoint_is_a_shard_a_block(recipe, family, workspace, monkeypatch):
    section, options = RECIPES[recipe]
    folder = made(options, section, family)
    whole = {name: p.clone() for name, p in logits(load(f"{section}/made"))}
    stored = load_file(folder / "model.safetensors")
    monkeypatch.setattr(stream, "ONE_FILE", 1000)
    made(options, section, family)

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    parts = sorted(file.name for file in folder.glob("*.safetensors"))
    assert not (folder / "model.safetensors").exists()
    assert sorted(set(index["weight_map"].values())) == parts
    held = {}
    for part in parts:
        with safe_open(folder / part, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
        held |= {name: (part, tensor) for name, tensor in load_file(folder / part).items()}
    assert {name: part for name, (part, _) in held.items()} == index["weight_map"]
    assert held.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, (_, tensor) in held.items())
    model = load(f"{section}/made")
    for block, _ in blocks(model):
        assert len({part for name, (part, _) in held.items() if name.startswith(f"{block}.")}) == 1
    assert record(f"{section}/made")["bytes_on_disk"] == sum((folder / part).stat().st_size for part in parts)
    for name, parameter in logits(model):
        assert torch.equal(parameter, whole[name]), name
    assert not leftovers()


def logits(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The weights, packed ones unpacked by a forward, and the logits of it."""
    with torch.no_grad():
        out = model(input_ids=torch.arange(16)[None]).logits
    return [*model.named_parameters(), ("logits", out)]


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


def test_a_run_killed_while_the_artifact_is_put_together_goes_on(workspace, monkeypatch):
    folder = made(WANDA)
    never = files(folder)

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stream, "lineage", kill)
        made(WANDA)
    assert files(folder) == never
    compressed = counted(monkeypatch)
    made(WANDA)
    assert not compressed
    assert files(folder) == never
    assert not leftovers()


def killed_after_a_block(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        counted(patch, kill_at=8)
        made(options)
    assert len(leftovers()) == 2


def test_another_recipe_does_not_go_on_with_these_blocks(workspace, monkeypatch):
    killed_after_a_block(monkeypatch, WANDA)
    compressed = counted(monkeypatch)
    folder = made(WANDA | {"sparsity": 0.25})
    assert len(compressed) == 14
    assert record("prune/made")["sparsity"] == 0.25
    assert not leftovers()
    fresh = files(folder)
    made(WANDA | {"sparsity": 0.25})
    assert files(folder) == fresh


@pytest.mark.parametrize(
    "changed", ["models/base/tiny/model.safetensors", "datasets/news/calibration.parquet"]
)
def test_another_source_or_text_does_not_go_on_with_these_blocks(changed, workspace, monkeypatch):
    killed_after_a_block(monkeypatch, WANDA)
    chosen = params("llama", {"prune/made": {"source": "base/tiny", **WANDA}})
    altered(Path("data") / changed)
    compressed = counted(monkeypatch)
    chosen.prune["made"].execute("prune/made", chosen.run)
    assert len(compressed) == 14
    assert not leftovers()


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"threads": 2}])
def test_other_numerics_do_not_go_on_with_these_blocks(change, workspace, monkeypatch):
    killed_after_a_block(monkeypatch, WANDA)
    chosen = params("llama", {"prune/made": {"source": "base/tiny", **WANDA}})
    compressed = counted(monkeypatch)
    chosen.prune["made"].execute("prune/made", chosen.run.model_copy(update=change))
    assert len(compressed) == 14


def fact_changed(content: bytes) -> bytes:
    told = json.loads(content)
    told["sizes"] = {name: value + 1 for name, value in told["sizes"].items()}
    return json.dumps(told).encode()


DAMAGE: dict[tuple[str, str], Callable[[bytes], bytes | None]] = {
    ("safetensors", "gone"): lambda content: None,
    ("safetensors", "empty"): lambda content: b"",
    ("safetensors", "cut"): lambda content: content[:-1],
    ("safetensors", "zeroed"): lambda content: content[:-40] + bytes(40),
    ("json", "empty"): lambda content: b"",
    ("json", "cut"): lambda content: content.rstrip()[:-1],
    ("json", "binary"): lambda content: b"\xff\xfe",
    ("json", "another"): lambda content: b"{}",
    ("json", "null"): lambda content: b"null",
    ("json", "list"): lambda content: b"[]",
    ("json", "changed"): fact_changed,
}


@pytest.mark.parametrize(("suffix", "how"), DAMAGE)
@pytest.mark.parametrize("sequential", ["linear", "none"])
def test_a_finished_block_that_is_not_as_it_was_written_is_done_again(
    sequential, suffix, how, workspace, monkeypatch, caplog
):
    options = WANDA | {"calibration": TEXT | {"sequential": sequential}}
    expected = files(made(options))
    killed_after_a_block(monkeypatch, options)
    (file,) = Path("data/scratch/resume").rglob(f"*.{suffix}")
    content = DAMAGE[suffix, how](file.read_bytes())
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    compressed = counted(monkeypatch)
    with caplog.at_level("WARNING"):
        assert files(made(options)) == expected
    assert len(compressed) == 14
    assert "00000.safetensors or its JSON is not as it was written: its block is done again" in caplog.text
    assert leftovers() == []


def test_a_finished_block_that_cannot_be_read_now_stays(workspace, monkeypatch):
    expected = files(made(WANDA))
    killed_after_a_block(monkeypatch, WANDA)
    there = sorted(leftovers())

    def fails(file: Path) -> str:
        raise OSError(errno.EMFILE, "Too many open files")

    with (
        monkeypatch.context() as patched,
        pytest.raises(Refusal, match=r"cannot be read .*Too many .* delete the folder"),
    ):
        patched.setattr(stream, "sha256", fails)
        made(WANDA)
    assert sorted(leftovers()) == there
    compressed = counted(monkeypatch)
    assert files(made(WANDA)) == expected
    assert len(compressed) == 7


def test_nothing_is_generated_for_what_is_refused(workspace, monkeypatch):
    monkeypatch.setattr(generation, "generate_windows", lambda *_: pytest.fail("generated"))
    text = TEXT | {"tokens": "generated", "seed": 0, "temperature": 1.0, "prompt_length": 4}
    with pytest.raises(Refusal, match="24 does not divide the input of 14 linears"):
        made(WANDA | {"structure": "6:24", "sparsity": 0.75, "calibration": text})


@pytest.mark.parametrize("sparsity", [0.3, 0.613])
@pytest.mark.parametrize("floor_rows", [False, True])
@pytest.mark.parametrize("recipe", ["magnitude", "wanda"])
def test_rows_lose_their_share_or_its_floor(recipe, floor_rows, sparsity, workspace):
    evenly = {"allocation": {"kind": "uniform", "floor_rows": floor_rows}, "sparsity": sparsity}
    made(PRUNE[recipe] | evenly | ({"scope": "row"} if recipe == "magnitude" else {}))
    zeros = total = 0
    for one in linears(load("prune/made")):
        (rows, columns), each = one.weight.shape, (one.weight == 0).sum(1)
        zeros, total = zeros + int(each.sum()), total + one.weight.numel()
        if floor_rows:
            assert each.tolist() == [int(columns * sparsity + 1e-6)] * rows
        else:
            assert int(each.sum()) == int(rows * columns * sparsity + 1e-6)
            assert int(each.max()) - int(each.min()) <= 1
    assert record("prune/made")["sparsity"] == zeros / total
    assert (zeros / total < sparsity - 0.005) if floor_rows else (0 <= sparsity * total - zeros < 14)


def test_windows_that_are_generated_are_generated_once(workspace, monkeypatch):
    """An allocation that reads text and the method's statistic see the same."""
    drawn: list[torch.Tensor] = []
    honest = generation.generate_windows

    def watch(*args: Any) -> torch.Tensor:
        drawn.append(honest(*args))
        return drawn[-1]

    monkeypatch.setattr(generation, "generate_windows", watch)
    text = TEXT | {"tokens": "generated", "seed": 0, "temperature": 1.0, "prompt_length": 4}
    made(WANDA | {"allocation": {"kind": "owl", "multiple": 2.0}, "calibration": text})
    assert len(drawn) == 1


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


def test_a_model_looked_at_is_given_up_block_by_block(workspace):
    chosen = params("llama", {})
    do(chosen)
    source, plain = Empty("base/tiny", chosen.run), load("base/tiny")
    for name, block in blocks(source.model):
        with source.block(name, block) as done:
            assert not done
            for local, parameter in block.named_parameters():
                assert torch.equal(parameter, plain.get_parameter(f"{name}.{local}"))
        assert all(parameter.device.type == "meta" for parameter in block.parameters())
    assert not Path("data/scratch/resume").exists()


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


def test_a_source_of_another_dtype_is_read_in_the_runs(workspace):
    chosen = params("llama", {"prune/made": {"source": "base/tiny", **WANDA}})
    do(params("llama", {}))
    load("base/tiny").float().save_pretrained("data/models/base/tiny")
    chosen.prune["made"].execute("prune/made", chosen.run)
    assert {t.dtype for t in load_file("data/models/prune/made/model.safetensors").values()} == {
        torch.bfloat16
    }


def test_dead_features_are_told_once_a_linear(workspace, caplog):
    recipes = {"wanda": WANDA, "sparsegpt": SPARSEGPT, "gptq": GPTQ}
    sections = {"wanda": "prune", "sparsegpt": "prune", "gptq": "quantize"}
    said = {
        "wanda": "the first of their row to go",
        "sparsegpt": "the first to go, as far as the sparsity reaches",
        "gptq": "rounded as they are",
    }
    chosen = params("llama", {f"{sections[n]}/{n}": {"source": "base/tiny", **r} for n, r in recipes.items()})
    do(params("llama", {}))
    model = load("base/tiny")
    model.model.layers[1].post_attention_layernorm.weight.data[:5] = 0
    model.save_pretrained("data/models/base/tiny")
    for name, section in sections.items():
        caplog.clear()
        logging.disable(logging.NOTSET)
        with caplog.at_level(logging.INFO):
            getattr(chosen, section)[name].execute(f"{section}/{name}", chosen.run)
        for linear in ("gate_proj", "up_proj"):
            line = f"model.layers.1.mlp.{linear}: 5 of 32 input features are zero on every token; "
            assert caplog.text.count(line) == 1
            assert f"{line}their weights are {said[name]}" in caplog.text
        assert caplog.text.count("on every token") == 2
        if section == "prune":
            gate = load(f"prune/{name}").model.layers[1].mlp.gate_proj.weight
            assert (gate[:, :5] == 0).all() and int((gate == 0).sum()) == gate.numel() / 2


@pytest.mark.parametrize(
    ("recipe", "linears", "said"),
    [
        (
            {"method": "width", "importance": "activation", "remove": 0.5},
            ["down_proj"],
            "are zero on every token; their weights are of no importance",
        ),
        (
            {
                "method": "stepwise", "sparsity": 0.3, "max_rise": 9.0, "held_out": 1,
                "policy": {"kind": "rules"},
            },
            ["gate_proj", "up_proj", "down_proj"],
            "are zero on every token; their weights are the first of their row to go",
        ),
        (
            {
                "method": "resp", "sparsity": 0.3, "scope": "row", "steps": 3,
                "calibration": TEXT
                | {"tokens": "generated", "seed": 0, "temperature": 1.0, "prompt_length": 8},
            },
            ["gate_proj", "up_proj", "down_proj"],
            "get no gradient from the generated tokens; their weights are the first to go",
        ),
    ],
    ids=["width", "stepwise", "resp"],
)  # fmt: skip
def test_dead_features_are_told_once_by_what_has_the_whole_model(recipe, linears, said, workspace, caplog):
    chosen = params("llama", {"prune/made": {"source": "base/tiny", "calibration": TEXT, **recipe}})
    do(params("llama", {}))
    model = load("base/tiny")
    model.model.layers[1].post_attention_layernorm.weight.data[:5] = 0
    model.model.layers[1].mlp.gate_proj.weight.data[:5] = 0  # so that down reads zeros
    model.save_pretrained("data/models/base/tiny")
    logging.disable(logging.NOTSET)
    with caplog.at_level(logging.INFO):
        chosen.prune["made"].execute("prune/made", chosen.run)
    wide = model.config.intermediate_size
    for linear in linears:
        line = f"model.layers.1.mlp.{linear}: 5 of {wide if linear == 'down_proj' else 32} input features "
        assert caplog.text.count(f"{line}{said}") == 1
    assert caplog.text.count("input features") == len(linears)


def test_scores_that_are_no_numbers_are_refused_by_name(workspace, monkeypatch):
    monkeypatch.setattr(
        "stages.pruning.wanda.wanda_scores", lambda weight, norm: lambda at: weight[at] * torch.nan
    )
    with pytest.raises(
        Refusal, match=r"model\.layers\.0\.self_attn\.q_proj: the scores of some weights are NaN"
    ):
        made(WANDA)
    assert not leftovers()


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


def test_a_method_of_its_own_needs_no_more_than_weights(workspace):
    """What the walk asks of a method: nothing of modules, files or devices."""
    do(params("llama", {}))
    method = Magnitude(
        source="base/tiny", method="magnitude", sparsity=0.5, scope="row", calibration=NONE,
        ignore=("mlp.up_proj",),
    )  # fmt: skip
    run = Run(device="cpu", dtype="bfloat16", threads=1, seed=0)
    method.execute("prune/own", run)
    for linear, before in zip(linears(load("prune/own")), linears(load("base/tiny")), strict=True):
        alone = method.weights(before.weight, None, before.weight.numel() // 2)
        untouched = linear.name.endswith("up_proj")
        assert torch.equal(linear.weight, before.weight if untouched else alone)


EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight")


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


GONE = "model.layers.1.mlp.up_proj.weight"


def spoil(folder: Path, how: str) -> None:
    """Make a whole checkpoint one that is not."""
    file = folder / "model.safetensors"
    if how == "config":
        (folder / "config.json").unlink()
    elif how == "tokenizer":
        (folder / "tokenizer.json").write_text("{")
    elif how == "no tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif how == "cut":
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content[:-100])
    else:
        tensors = load_file(file)
        tensors[GONE] = tensors[GONE][:-1].clone()
        if how == "gone":
            del tensors[GONE]
        file.unlink()
        save_file(tensors, file, metadata={"format": "pt"})


SPOILED = {
    "gone": rf"base/tiny has no {GONE}, which its config asks for; get it or its own config anew",
    "shape": rf"base/tiny has {GONE} of \[63, 32\] and not \[64, 32\], as its config asks for",
    "cut": r"base/tiny cannot be loaded \(SafetensorError: .*; see that its files can be read",
    "config": r"the config of base/tiny cannot be loaded \(",
    "tokenizer": r"the tokenizer of base/tiny cannot be loaded \(",
    "no tokenizer": r"the tokenizer of base/tiny cannot be loaded \(",
}


@pytest.mark.parametrize("recipe", [MAGNITUDE, {"method": "width", "importance": "ppm", "remove": 0.5}])
@pytest.mark.parametrize("how", SPOILED)
def test_a_source_that_is_not_whole_is_refused(how, recipe, workspace):
    do(params("llama", {}))
    spoil(Path("data/models/base/tiny"), how)
    with pytest.raises(Refusal, match=SPOILED[how]):
        made({"calibration": {"dataset": "none"}, **recipe})
    assert not Path("data/models/prune/made").exists() and not leftovers()


def test_a_file_cut_off_while_it_is_read_is_refused(workspace):
    chosen = params("llama", {})
    do(chosen)
    empty = Empty("base/tiny", chosen.run)
    spoil(MODELS / "base/tiny", "cut")
    name, block = blocks(empty.model)[1]
    with pytest.raises(Refusal, match=SPOILED["cut"]), empty.block(name, block):
        pass


def test_blocks_finished_before_a_file_could_not_be_read_stay(workspace, monkeypatch):
    chosen = params("llama", {"prune/made": {"source": "base/tiny", **MAGNITUDE}})
    do(chosen)
    whole = (MODELS / "prune/made/model.safetensors").read_bytes()
    shutil.rmtree(MODELS / "prune/made")
    opened = source.safe_open

    def fails(file: Path, framework: str) -> Any:
        if leftovers():
            raise OSError(errno.EIO, "Input/output error")
        return opened(file, framework)

    with monkeypatch.context() as patched:
        patched.setattr(source, "safe_open", fails)
        with pytest.raises(Refusal, match=r"base/tiny cannot be loaded \(OSError: \[Errno 5\]"):
            chosen.prune["made"].execute("prune/made", chosen.run)
    assert [file.name for file in leftovers() if file.suffix == ".json"] == ["00000.json"]
    chosen.prune["made"].execute("prune/made", chosen.run)
    assert (MODELS / "prune/made/model.safetensors").read_bytes() == whole and not leftovers()


UP = "model.layers.1.mlp.up_proj.weight"
PACKED: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "packed gone": lambda held: held.pop(f"{UP}_packed"),
    "packed short": lambda held: held.update({f"{UP}_packed": held[f"{UP}_packed"][:-1].clone()}),
    "scale gone": lambda held: held.pop(f"{UP}_scale"),
    "scale short": lambda held: held.update({f"{UP}_scale": held[f"{UP}_scale"][:-1].clone()}),
    "shape gone": lambda held: held.pop(f"{UP}_shape"),
    "shape wrong": lambda held: held.update({f"{UP}_shape": torch.tensor([64, 16])}),
}


@pytest.mark.parametrize("recipe", [MAGNITUDE, {"method": "width", "importance": "ppm", "remove": 0.5}])
@pytest.mark.parametrize("how", PACKED)
def test_a_packed_source_that_is_not_whole_is_refused(how, recipe, workspace):
    packed = {"source": "base/tiny", **RTN}
    then = {"source": "quantize/packed", "calibration": {"dataset": "none"}, **recipe}
    do(params("llama", {"quantize/packed": packed}))
    file = MODELS / "quantize/packed/model.safetensors"
    held = load_file(file)
    PACKED[how](held)
    file.unlink()
    save_file(held, file, metadata={"format": "pt"})
    chosen = params("llama", {"quantize/packed": packed, "prune/made": then})
    with pytest.raises(Refusal, match=r"^quantize/packed (cannot be loaded|has) "):
        chosen.prune["made"].execute("prune/made", chosen.run)
    assert not Path("data/models/prune/made").exists()


def test_a_mixture_with_an_expert_of_another_shape_is_refused(workspace):
    chosen = params("llama", {"prune/made": {"source": "base/tiny", **MAGNITUDE, "ignore": EXPERTS}})
    do(params("llama", {}))
    mixture().save_pretrained(MODELS / "base/tiny")
    held = load_file(file := MODELS / "base/tiny/model.safetensors")
    name = next(name for name in held if ".experts." in name)
    held[name] = held[name][:-1].clone()
    file.unlink()
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(Refusal, match=r"^base/tiny (cannot be loaded|has) "):
        chosen.prune["made"].execute("prune/made", chosen.run)


@pytest.mark.parametrize("how", ["gone", "shape", "cut", "tokenizer", "no tokenizer"])
def test_a_download_that_is_not_whole_is_refused(how, workspace):
    shutil.copytree(Path("inputs/llama").resolve(), own := Path("own"))
    spoil(own, how)
    chosen = params("llama", {})
    whole = {"source": "path:own", "sha256": sha256(own)}
    chosen.models["tiny"] = chosen.models["tiny"].model_copy(update=whole)
    said = SPOILED[how].replace("base/tiny", "path:own")
    with pytest.raises(Refusal, match=said):
        do(chosen)
    assert not Path("data/models/base/tiny").exists() and not leftovers()
