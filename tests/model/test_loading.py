"""An artifact counts once plain transformers has loaded it, whatever a recipe left alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ApertusConfig, AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from stages.core.errors import Refusal
from stages.model import artifact, stream
from stages.model.artifact import Unloadable, check_loads
from stages.model.blocks import linears
from stages.model.names import as_stored
from tests import families
from tests.pipeline import NONE, TEXT, dense, do, load, params, record

MIXTURES = {
    "mixtral": MixtralConfig(**families._GATED, num_local_experts=2, num_experts_per_tok=1),
    "qwen3_moe": Qwen3MoeConfig(
        **families._GATED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "olmoe": OlmoeConfig(**families._GATED, num_experts=4, num_experts_per_tok=2),
}
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "bits": 4, "group_size": 32, "calibration": NONE},
    "rtn asymmetric": {
        "method": "rtn", "bits": 3, "group_size": 32, "symmetric": False, "calibration": NONE,
    },
    "gptq": {"method": "gptq", "bits": 4, "group_size": 32, "calibration": TEXT},
    "awq": {"method": "awq", "bits": 4, "group_size": 32, "calibration": TEXT | {"sequential": "block"}},
    "smoothquant": {"method": "smoothquant", "calibration": TEXT | {"sequential": "block"}},
    "fp8": {"method": "fp8", "activations": "dynamic", "calibration": NONE},
    "nvfp4": {"method": "nvfp4", "calibration": NONE},
    "mxfp4": {"method": "mxfp4", "calibration": NONE},
}  # fmt: skip
RTN = {"source": "base/tiny", **RECIPES["rtn"]}
EVERY = [(family, recipe) for family in MIXTURES for recipe in RECIPES]
FEW = {("qwen3_moe", "rtn"), ("mixtral", "smoothquant")}


@pytest.fixture
def mixtures(own_inputs, monkeypatch) -> Path:
    """Inputs to write to, and the mixtures as families."""
    for family, config in MIXTURES.items():
        monkeypatch.setitem(families.CONFIGS, family, config)
        monkeypatch.setitem(families.IN_FEATURES, family, [32])
    return own_inputs


@pytest.mark.parametrize(
    ("family", "recipe"), [pytest.param(*c, marks=[] if c in FEW else pytest.mark.drill) for c in EVERY]
)
def test_experts_left_alone_are_loaded_beside_packed_linears(family, recipe, mixtures):
    families.save(family, mixtures / family)
    made = {"source": "base/tiny", "ignore": list(families.EXPERTS), **RECIPES[recipe]}
    then = {
        "source": "quantize/made", "ignore": list(families.EXPERTS), "method": "magnitude", "sparsity": 0.5,
        "scope": "matrix", "calibration": NONE,
    }  # fmt: skip
    tuned = {
        "source": "quantize/made", "ignore": list(families.EXPERTS), "method": "qat", "train": TEXT,
        "learning_rate": 0.01, "steps": 1, "batch_size": 2,
    }  # fmt: skip
    chain: dict[str, dict[str, Any]] = {"quantize/made": made, "prune/after": then}
    if recipe == "rtn":
        chain["finetune/tuned"] = tuned
    do(params(family, chain), list(chain))
    assert record("quantize/made")["layout"] not in ("dense", "fake_quantized")
    base = load("base/tiny")
    compressed = {f"{linear.name}.weight" for linear in linears(base, families.EXPERTS)}
    for name in chain:
        model = dense(load(name))
        for parameter, tensor in base.named_parameters():
            changed = not torch.equal(model.get_parameter(parameter), tensor)
            folded = recipe in ("awq", "smoothquant") and "norm" in parameter
            assert folded or name == "finetune/tuned" or changed == (parameter in compressed), parameter


def fail_once(monkeypatch) -> list[int]:
    """Let the first checkpoint that is tried be unloadable; return the calls."""
    calls: list[int] = []

    def check(label: str, folder: Path) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise Unloadable("it fails")
        check_loads(label, folder)

    monkeypatch.setattr(stream, "check_loads", check)
    return calls


def test_what_does_not_load_packed_is_written_dense(workspace, monkeypatch):
    calls = fail_once(monkeypatch)
    do(params("llama", {"quantize/made": RTN}))
    assert len(calls) == 2 and record("quantize/made")["layout"] == "fake_quantized"
    model = load("quantize/made")
    assert all(len(linear.weight[0, :32].unique()) <= 16 for linear in linears(model))


def test_rounded_inputs_that_do_not_load_are_refused(workspace, monkeypatch):
    fail_once(monkeypatch)
    with pytest.raises(Refusal, match="it fails"):
        do(params("llama", {"quantize/made": {"source": "base/tiny", **RECIPES["fp8"]}}))
    assert not Path("data/models/quantize").exists()


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"intermediate_size": 96}])
def test_a_checkpoint_that_does_not_load_is_refused(change, large, tmp_path, monkeypatch):
    if large:  # tried on the meta device
        monkeypatch.setattr(artifact, "ONE_FILE", 0)
    families.model("llama").save_pretrained(tmp_path)
    check_loads("it", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(Unloadable, match="plain transformers fails on the result, so it was not kept: it"):
        check_loads("it", tmp_path)


def test_a_stored_buffer_that_is_missing_is_refused(tmp_path):
    """transformers would fill it with whatever lies in memory."""
    model = AutoModelForCausalLM.from_config(ApertusConfig(**families._GATED))
    model.save_pretrained(tmp_path)
    check_loads("it", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.act_fn.beta"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(Unloadable, match=r"it lacks model\.layers\.1\.mlp\.act_fn\.beta, which its config"):
        check_loads("it", tmp_path)


def test_a_checkpoint_that_loads_and_does_not_answer_is_refused(tmp_path, monkeypatch):
    families.model("llama").save_pretrained(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no answer")

    monkeypatch.setattr(type(families.model("llama")), "forward", fail)
    with pytest.raises(Unloadable, match="ValueError: no answer"):
        check_loads("it", tmp_path)


def test_names_on_disk_change_only_where_tensors_would_be_split():
    mixture, neox = families.mixture(), families.model("gpt_neox")
    for model in (neox, families.model("llama")):
        tensors = model.state_dict()
        plain, packed = (as_stored(model, tensors, packed=packed) for packed in (False, True))
        assert plain.keys() == packed.keys()
    names = as_stored(mixture, mixture.state_dict(), packed=True)
    whole = {name for name in mixture.state_dict() if "experts" in name}
    assert len(whole) == 4 and whole == {name for name in names if "experts" in name}
