"""Quantized checkpoints of every format, made of a pruned model: transformers reads what was computed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FalconConfig, GPTBigCodeConfig

from stages.core.errors import Refusal
from stages.core.tables import describe
from stages.job.params import Params
from stages.model.artifact import load_model
from stages.model.blocks import linears
from stages.model.packed import code_from
from tests import families
from tests.pipeline import NONE, TEXT, dense, do, load, params, record

RECIPES: dict[str, dict[str, Any]] = {
    "rtn-w2": {"method": "rtn", "bits": 2, "group_size": 16},
    "rtn-w3-asymmetric": {"method": "rtn", "bits": 3, "group_size": 16, "symmetric": False},
    "rtn-w8-asymmetric-by-row": {"method": "rtn", "bits": 8, "group_size": None, "symmetric": False},
    "rtn-w7": {"method": "rtn", "bits": 7, "group_size": None},
    "gptq-w4-in-order": {
        "method": "gptq", "bits": 4, "group_size": 16, "symmetric": False, "act_order": True,
        "static_groups": True, "calibration": TEXT,
    },
    "hqq-w4": {"method": "hqq", "bits": 4, "group_size": 32},
    "hqq-w3-symmetric": {"method": "hqq", "bits": 3, "group_size": 32, "symmetric": True},
    "fp8-as-a-whole": {"method": "fp8", "strategy": "tensor"},
    "fp8-with-inputs": {"method": "fp8", "activations": "dynamic"},
    "mxfp4": {"method": "mxfp4"},
    "nvfp4": {"method": "nvfp4"},
    "nf4": {"method": "nf4", "group_size": 32, "double_quant": True},
}  # fmt: skip
PRUNED = {
    "source": "base/tiny",
    "method": "magnitude",
    "sparsity": 0.5,
    "scope": "matrix",
    "calibration": NONE,
}


def made(family: str, recipe: dict[str, Any], dtype: str = "bfloat16", **more: dict[str, Any]) -> Params:
    """A pruned model of `family`, quantized by `recipe` into quantize/made, and `more` artifacts after."""
    chosen = params(
        family,
        {
            "prune/half": PRUNED,
            "quantize/made": {"source": "prune/half", "calibration": NONE} | recipe,
            **{name.replace("_", "/", 1): settings for name, settings in more.items()},
        },
    )
    return chosen.model_copy(update={"run": chosen.run.model_copy(update={"dtype": dtype})})


def scheme() -> dict[str, Any]:
    config = json.loads(Path("data/models/quantize/made/config.json").read_text())["quantization_config"]
    return {**config["config_groups"]["group_0"], "format": config["format"]}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_what_is_read_is_what_was_computed(recipe, dtype, workspace):
    chosen = made("llama", recipe, dtype)
    do(chosen)
    source = load_model("prune/half", chosen.run, dequantize=True)
    plain = dense(
        AutoModelForCausalLM.from_pretrained("data/models/quantize/made", dtype=chosen.run.torch_dtype).eval()
    )
    trained = load_model("quantize/made", chosen.run, dequantize=True)
    stored = load_file("data/models/quantize/made/model.safetensors")
    method = chosen.quantize["made"]
    told = record("quantize/made")
    zeros = nonzero = 0
    for linear in linears(source):
        name = f"{linear.name}.weight"
        read = plain.get_submodule(linear.name).weight
        assert torch.equal(trained.get_parameter(name), read)
        assert (read[linear.weight == 0] == 0).all()
        zeros += int((read == 0).sum())
        nonzero += read.numel()
        if told["layout"] == "fake_quantized":
            assert torch.equal(read, stored[name])
        else:
            code = code_from(stored, name, scheme())
            assert torch.equal(read, code.dequantize().to(read.dtype))
        if recipe["method"] != "gptq":  # what needs no data is computed again
            computed = method.weights(linear.weight, None)
            assert torch.equal(computed.dequantize().to(read.dtype), read)
            if told["layout"] != "fake_quantized":
                for suffix, tensor in computed.tensors().items():
                    assert torch.equal(stored[f"{linear.name}.{suffix}"], tensor)
    assert told["sparsity"] == zeros / nonzero >= 0.5
    assert told["notes"]["quantize/made"]["quantized_linears"] == len(linears(source))
    row = describe(told)
    assert (row["quantize_method"], row["bits"]) == (recipe["method"], method.bits)
    assert row["group_size"] == method.group_size


@pytest.mark.parametrize("name", ["rtn-w3-asymmetric", "fp8-with-inputs", "mxfp4", "nvfp4"])
def test_what_is_pruned_after_is_dense_and_keeps_its_zeros(name, workspace):
    after = PRUNED | {"source": "quantize/made", "sparsity": 0.75}
    chosen = made("llama", RECIPES[name], prune_after=after)
    do(chosen, ["prune/half", "quantize/made", "prune/after"])
    told = record("prune/after")
    assert told["layout"] == "dense" and told["sparsity"] >= 0.75
    before = load_model("quantize/made", chosen.run, dequantize=True)
    for linear in linears(load("prune/after")):
        source = before.get_parameter(f"{linear.name}.weight")
        kept = linear.weight != 0
        assert torch.equal(linear.weight[kept], source[kept])
    assert "bits" not in describe(told)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_four_bit_floats_load_in_any_dtype(name, workspace):
    do(made("llama", RECIPES[name]))
    for dtype in (torch.float32, torch.float16):
        loaded = AutoModelForCausalLM.from_pretrained("data/models/quantize/made", dtype=dtype).eval()
        assert dense(loaded).dtype == dtype  # and its logits are finite
        assert all(linear.weight.any() for linear in linears(loaded))


@pytest.mark.parametrize("name", ["rtn-w3-asymmetric", "fp8-with-inputs", "mxfp4", "nvfp4", "nf4"])
def test_what_was_finished_before_a_kill_is_read_back(name, workspace, monkeypatch):
    chosen, file = made("llama", RECIPES[name]), Path("data/models/quantize/made/model.safetensors")
    do(chosen)
    whole, config = file.read_bytes(), (file.parent / "config.json").read_bytes()
    method = type(chosen.quantize["made"])
    original, calls = method.weights, 0

    def killed(self, weight, statistic):
        nonlocal calls
        calls += 1
        if calls == 8:  # the first linear of the second block
            raise KeyboardInterrupt
        return original(self, weight, statistic)

    monkeypatch.setattr(method, "weights", killed)
    with pytest.raises(KeyboardInterrupt):
        do(chosen, ["quantize/made"])
    do(chosen, ["quantize/made"])
    assert calls == 8 + 7  # nothing of the first block again
    assert file.read_bytes() == whole and (file.parent / "config.json").read_bytes() == config


def test_inputs_are_rounded_where_the_checkpoint_says_so(workspace):
    do(made("llama", RECIPES["fp8-with-inputs"], "float32"))
    ids = torch.arange(16)[None]
    rounding, plain = load("quantize/made"), made("llama", {"method": "fp8"}, "float32")
    with torch.no_grad():
        rounded = rounding(input_ids=ids).logits
        do(plain)
        exact = load("quantize/made")(input_ids=ids).logits
    away = (rounded - exact).norm() / exact.norm()
    assert 0.001 < away < 0.2


def test_inputs_that_no_format_would_round_are_refused(workspace):
    with pytest.raises(Refusal, match=r"fp8 does not serve gpt2, .*: no format runs Conv1D"):
        do(made("gpt2", RECIPES["fp8-with-inputs"]))


UNLOADED = {
    "falcon": FalconConfig(
        vocab_size=families.VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **families._IDS
    ),
    "gpt_bigcode": GPTBigCodeConfig(
        vocab_size=families.VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256, **families._IDS
    ),
}


@pytest.mark.parametrize("family", UNLOADED)
def test_what_could_not_be_loaded_packed_is_dense(family, workspace, monkeypatch):
    """Loading initialises, and that of these families reads the weights of linears."""
    monkeypatch.setitem(families.CONFIGS, family, UNLOADED[family])
    monkeypatch.setitem(families.IN_FEATURES, family, [32, 128])
    families.save(family, Path("inputs") / family)
    do(made(family, RECIPES["hqq-w4"]))
    assert record("quantize/made")["layout"] == "fake_quantized"
    for one in linears(load("quantize/made")):
        assert max(len(group.unique()) for group in one.weight.reshape(-1, 32)) <= 16
    with pytest.raises(Refusal, match=r"fp8 does not serve \w+ForCausalLM: transformers cannot load"):
        do(made(family, RECIPES["fp8-with-inputs"]))


def test_bits_a_weight_count_scales_and_zero_points(workspace):
    counts = {}
    for symmetric in (True, False):
        recipe = {"source": "base/tiny", "method": "rtn", "bits": 4, "group_size": 16, "symmetric": symmetric}
        do(params("llama", {"quantize/made": recipe | {"calibration": NONE}}))
        told = record("quantize/made")
        counts[symmetric] = told["bits_per_weight"] * told["num_parameters"]
    weights = sum(linear.weight.numel() for linear in linears(load("base/tiny")))
    rest = record("quantize/made")["num_parameters"] - weights
    # No weight of the base is zero, and no code that is would make a bitmap pay.
    assert counts[True] == pytest.approx(weights * (4 + 16 / 16) + rest * 16, rel=1e-6)
    assert counts[False] == pytest.approx(weights * (4 + (16 + 4) / 16) + rest * 16, rel=1e-6)


def test_the_grid_of_a_pruning_recipe_is_told(workspace):
    recipe = {
        "source": "base/tiny", "method": "sparsegpt", "sparsity": 0.5, "calibration": TEXT,
        "grid": {"bits": 4, "group_size": 16},
    }  # fmt: skip
    do(params("llama", {"prune/joint": recipe}))
    row = describe(record("prune/joint"))
    assert (row["bits"], row["group_size"], row["layout"]) == (4, 16, "pack-quantized")
