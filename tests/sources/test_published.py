"""A published compressed checkpoint: loaded as its users load it, its sizes those of its files."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.job.load import checked_params
from stages.job.params import Params
from stages.sources import published as published_sources
from stages.sources.published import Published
from tests import pipeline, project
from tests.ggufs import write_model
from tests.scoring import changed, scored

RTN = {"source": "base/tiny", "method": "rtn", "bits": 4, "group_size": 32, "calibration": pipeline.NONE}


def published(**options) -> Params:
    """Params with the model `theirs` in the folder or file `theirs`, beside the tiny base."""
    chosen = pipeline.params("llama", {})
    models = json.loads(chosen.model_dump_json())["models"]
    settings = {"source": "path:theirs", "format": "packed", "sha256": sha256(Path("theirs")), **options}
    suites = {"perplexity": {"news": {"windows": 3, "sequence_length": 32, "batch_size": 2}}}
    return changed(
        chosen,
        models={**models, "theirs": settings},
        suites={**suites, "graded": {}, "benchmark": {}},
        evaluate={"candidates": ["base/tiny", "base/theirs"]},
    )


@pytest.fixture
def compressed(workspace) -> dict:
    """A compressed-tensors checkpoint in the folder `theirs`; our record of the artifact it is a copy of."""
    pipeline.do(pipeline.params("llama", {"quantize/rtn": RTN}))
    shutil.copytree("data/models/quantize/rtn", "theirs", ignore=shutil.ignore_patterns("artifact.json"))
    return pipeline.record("quantize/rtn")


def test_a_checkpoint_of_compressed_tensors_is_scored_as_it_is(compressed):
    chosen = published()
    pipeline.download(chosen, "base/theirs")
    record = pipeline.record("base/theirs")
    assert record["layout"] == "compressed-tensors"
    assert (record["base"]["grid"]["bits"], record["base"]["grid"]["group_size"]) == (4, 32)
    for key in ("num_parameters", "sparsity", "bytes_on_disk"):
        assert record[key] == compressed[key]
    assert record["bits_per_weight"] == 8 * record["bytes_ideal"] / record["num_parameters"]
    assert compressed["bytes_ideal"] <= record["bytes_ideal"] < record["bytes_on_disk"]
    written = Path("data/models/base/theirs/model.safetensors").read_bytes()
    assert written == Path("theirs/model.safetensors").read_bytes()
    scores, _ = scored(chosen, "base/theirs", "news")
    ours, _ = scored(
        changed(
            chosen, quantize={"rtn": {**RTN, "calibration": {"dataset": "none"}}},
            evaluate={"candidates": ["quantize/rtn"]},
        ),
        "quantize/rtn", "news",
    )  # fmt: skip
    assert scores.value.tolist() == ours.value.tolist()
    assert (scores.base_grid == "compressed-tensors g32").all()
    assert (scores.bits == 4).all() and (scores.group_size == 32).all()


def test_a_gguf_has_the_sizes_of_its_file(workspace):
    Path("theirs").mkdir()
    write_model(Path("theirs/m.gguf"), gguf.GGMLQuantizationType.Q8_0)
    chosen = published(file="m.gguf", sha256=sha256(Path("theirs/m.gguf")))
    pipeline.download(chosen, "base/theirs")
    record = pipeline.record("base/theirs")
    matrices, norms = 2 * 8 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64 - 8 * 32, 3 * 32
    assert record["layout"] == "Q8_0"
    assert record["num_parameters"] == matrices + norms
    assert record["bytes_ideal"] == matrices * 34 // 32 + norms * 2
    assert record["bytes_on_disk"] == Path("theirs/m.gguf").stat().st_size
    assert (record["base"]["grid"]["format"], record["base"]["grid"]["bits"]) == ("Q8_0", 8)
    with torch.no_grad():
        assert (
            pipeline.load("base/theirs")(input_ids=torch.zeros(1, 4, dtype=torch.long))
            .logits.isfinite()
            .all()
        )


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}
GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize(
    ("settings", "bits", "group_size"),
    [
        (NF4, 4, 64), (INT8, 8, None),
        (GPTQ | {"group_size": 128}, 4, 128), (GPTQ | {"group_size": -1}, 4, None),
    ],
)  # fmt: skip
def test_bits_and_groups_are_those_of_the_files(settings, bits, group_size, tmp_path):
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 64]})
    tensors = {
        "model.norm.weight": torch.ones(4),
        "model.layers.0.up.weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(state.encode()), dtype=torch.uint8
        ),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    grid = published_sources._grid_of(settings, tmp_path)
    assert (grid["bits"], grid["group_size"]) == (bits, group_size)
    assert grid["format"] == settings["quant_method"]


@pytest.mark.parametrize(
    ("method", "package"),
    [("gptq", "gptqmodel optimum"), ("awq", "gptqmodel"), ("bitsandbytes", "bitsandbytes")],
)
def test_a_package_that_is_missing_is_named(method, package, compressed):
    config = json.loads(Path("theirs/config.json").read_text())
    layout = (
        {"bits": 4, "group_size": 32, "load_in_4bit": True}
        if method != "awq"
        else {"bits": 4, "group_size": 32}
    )
    config["quantization_config"] = {"quant_method": method, **layout}
    Path("theirs/config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal) as caught:
        pipeline.download(published(), "base/theirs")
    assert f"is stored by {method}, and a package that reads it is missing" in str(caught.value)
    assert f"run pip install {package}, or use a copy of the model in compressed-tensors" in str(caught.value)
    assert not Path("data/models/base/theirs").exists()


def test_a_plain_checkpoint_is_refused(workspace):
    shutil.copytree("inputs/llama", "theirs")
    with pytest.raises(Refusal, match=r"path:theirs is not quantized, .*; set format to safetensors or gguf"):
        pipeline.download(published(), "base/theirs")


@pytest.mark.parametrize(
    ("section", "recipe"),
    [
        (
            "prune",
            {"method": "magnitude", "sparsity": 0.5, "scope": "matrix", "calibration": {"dataset": "none"}},
        ),
        ("quantize", {key: value for key, value in RTN.items() if key != "source"}),
    ],
)
def test_a_recipe_on_packed_weights_is_refused_by_name(section, recipe, tmp_path):
    project.write_inputs(tmp_path / "inputs")
    raw = project.params(tmp_path / "inputs")
    raw["models"]["theirs"] = {"source": "hub:org/theirs@" + "0" * 40, "format": "packed"}
    raw[section]["more"] = {"source": "base/theirs", **recipe}
    with pytest.raises(Refusal) as caught:
        checked_params(raw)
    assert f"{section}.more.source: base/theirs is a published compressed checkpoint" in str(caught.value)
    del raw[section]["more"]
    raw["noise"]["theirs-batch"] = {"source": "base/theirs", "batch_size": 7}
    assert "theirs" in checked_params(raw).models


def test_a_file_other_than_gguf_is_refused():
    for wrong in ({"file": "model.safetensors"}, {"file": "m.gguf", "folder": "a"}):
        with pytest.raises(ValidationError, match=r"file is a single \.gguf"):
            Published(source="path:theirs", format="packed", **wrong)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("path:theirs", "models.theirs.sha256: this hash is missing; write"),
        ("pypi:theirs==1.0", "models.theirs.sha256: this hash is missing; `prunequant check --fix`"),
        ("hub:org/theirs@" + "0" * 40, "models.theirs: a .gguf file on the hub needs its sha256"),
    ],
)
def test_a_file_without_a_hash_is_one_problem(source, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    project.write_inputs(tmp_path / "inputs")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/m.gguf").write_bytes(b"GGUF")
    raw = project.params(tmp_path / "inputs")
    raw["models"]["theirs"] = {"source": source, "format": "packed", "file": "m.gguf"}
    with pytest.raises(Refusal, match=r"has 1 problem") as caught:
        checked_params(raw)
    assert sentence in str(caught.value)
