"""Packed files hold the codes that were computed, in every format and at every width."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FalconConfig, GPTBigCodeConfig

from stages.core.errors import Refusal
from stages.core.tables import subject
from stages.job.params import Params
from stages.model.artifact import load_model
from stages.model.blocks import linears
from stages.model.grid import Codes, Int8, Integers, Quantized, bounds
from stages.model.packed import FORMATS, code_from, tensors_of, weight_from
from tests import families
from tests.pipeline import NONE, TEXT, dense, do, load, params, record

NAME = "model.layers.0.mlp.up_proj"


def weight(seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(12, 96, generator=torch.Generator().manual_seed(seed)).to(dtype)


def drawn(bits: int, group_size: int | None, symmetric: bool) -> Codes:
    """Draw codes and zero points from their whole range."""
    generator, (low, high) = torch.Generator().manual_seed(bits), bounds(bits)
    groups = 96 // (group_size or 96)
    codes = torch.randint(low, high + 1, (12, 96), generator=generator, dtype=torch.int8)
    zero = torch.randint(low, high + 1, (12, groups), generator=generator, dtype=torch.int8)
    scale = torch.rand(12, groups, generator=generator).bfloat16()
    return Codes(codes, scale, bits, group_size, None if symmetric else zero)


def written(code: Quantized, folder) -> dict[str, torch.Tensor]:
    """Write codes to a file and read its tensors."""
    save_file(tensors_of(NAME, code), folder / "model.safetensors", metadata={"format": "pt"})
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("group_size", [8, 32, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_codes_are_read_back(bits, group_size, symmetric, tmp_path):
    code = drawn(bits, group_size, symmetric)
    stored, scheme = written(code, tmp_path), code.scheme()
    again = code_from(stored, f"{NAME}.weight", scheme)
    assert isinstance(again, Codes)
    assert torch.equal(again.codes, code.codes) and torch.equal(again.scale, code.scale)
    assert (again.bits, again.group_size) == (bits, group_size)
    assert (again.zero_point is None) == symmetric
    if not symmetric:
        assert torch.equal(again.zero_point, code.zero_point)
    assert torch.equal(weight_from(stored, f"{NAME}.weight", scheme), code.dequantize())
    # Packing pads the codes of a row, and the zero points of a column, to whole words.
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values()) - 2 * 8
    assert (
        0 <= size * 8 - code.stored_bits() < 32 * len(code.codes) + 32 * code.scale.shape[1] * (not symmetric)
    )


@pytest.mark.parametrize("rows", [1, 7, 8, 9])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_few_outputs_are_read_back(rows, bits, tmp_path):
    code = Integers(bits, 8, symmetric=False).nearest(weight(0)[:rows])
    again = code_from(written(code, tmp_path), f"{NAME}.weight", code.scheme())
    assert torch.equal(again.zero_point, code.zero_point)
    assert torch.equal(again.dequantize(), code.dequantize())


@pytest.mark.parametrize("group_size", [16, None])
@pytest.mark.parametrize("shared", [1, 2])
def test_plain_transformers_loads_packed_linears_of_few_outputs(shared, group_size, workspace, monkeypatch):
    """The library fails on 4-bit zero points of several groups of 8 outputs, so these are not packed."""
    config = copy.deepcopy(families.CONFIGS["llama"])
    config.num_key_value_heads = shared
    monkeypatch.setitem(families.CONFIGS, "few", config)
    monkeypatch.setitem(families.IN_FEATURES, "few", families.IN_FEATURES["llama"])
    shutil.copytree(workspace / "inputs", workspace / "own", symlinks=True)
    (workspace / "inputs").unlink()
    (workspace / "own").rename(workspace / "inputs")
    families.save("few", workspace / "inputs" / "few")
    recipe = {
        "source": "base/tiny", "method": "rtn", "bits": 4, "group_size": group_size, "symmetric": False,
        "calibration": NONE,
    }  # fmt: skip
    do(params("few", {"quantize/rtn": recipe}))
    packed = shared == 2 or group_size is None
    assert record("quantize/rtn")["layout"] == ("pack-quantized" if packed else "fake_quantized")
    base, grid = load("base/tiny"), Integers(4, group_size, symmetric=False)
    modules = dict(dense(load("quantize/rtn")).named_modules())
    for linear in linears(base):
        expected = grid.nearest(linear.weight).dequantize()
        assert torch.equal(modules[linear.name].weight, expected), linear.name


def test_eight_bit_codes_of_linears_with_rounded_inputs_are_read_back(tmp_path):
    near = Integers(8, None).nearest(weight(0))
    code = Int8(near.codes, near.scale)
    stored = written(code, tmp_path)
    assert {name.removeprefix(f"{NAME}.") for name in stored} == {"weight", "weight_scale"}
    again = code_from(stored, f"{NAME}.weight", code.scheme())
    assert isinstance(again, Int8) and torch.equal(again.codes, near.codes)
    assert torch.equal(again.dequantize(), near.dequantize())
    assert code.stored_bits() == near.stored_bits() and code.nonzero() == near.nonzero()


def test_dense_tensors_are_read_as_they_are():
    stored = {"norm.weight": torch.ones(4)}
    schemes: list[dict[str, Any] | None] = [None, Integers(4, 8).nearest(weight(0)).scheme()]
    for scheme in schemes:
        assert weight_from(stored, "norm.weight", scheme) is stored["norm.weight"]


def test_every_format_is_one_of_the_library():
    from compressed_tensors.config import CompressionFormat

    assert set(FORMATS) <= {known.value for known in CompressionFormat}


# The tests below quantize a pruned model by recipes of every format.

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


def quantized(family: str, recipe: dict[str, Any], dtype: str = "bfloat16", **more: dict[str, Any]) -> Params:
    """Params of a pruned model of `family`, quantized by `recipe` into quantize/made, and `more` recipes."""
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
def test_checkpoints_hold_what_was_computed(recipe, dtype, workspace):
    chosen = quantized("llama", recipe, dtype)
    do(chosen)
    source = load_model("prune/half", chosen.run, dequantize=True)
    plain = dense(
        AutoModelForCausalLM.from_pretrained("data/models/quantize/made", dtype=chosen.run.torch_dtype).eval()
    )
    trained = load_model("quantize/made", chosen.run, dequantize=True)
    stored = load_file("data/models/quantize/made/model.safetensors")
    method = chosen.quantize["made"]
    facts = record("quantize/made")
    zeros = total = 0
    for linear in linears(source):
        name = f"{linear.name}.weight"
        read = plain.get_submodule(linear.name).weight
        assert torch.equal(trained.get_parameter(name).cpu(), read)
        assert (read[linear.weight.cpu() == 0] == 0).all()
        zeros += int((read == 0).sum())
        total += read.numel()
        if facts["layout"] == "fake_quantized":
            assert torch.equal(read, stored[name])
        else:
            code = code_from(stored, name, scheme())
            assert torch.equal(read, code.dequantize().to(read.dtype))
        if recipe["method"] != "gptq":  # data-free methods are computed again
            computed = method.weights(linear.weight, None)
            assert torch.equal(computed.dequantize().cpu().to(read.dtype), read)
            if facts["layout"] != "fake_quantized":
                for suffix, tensor in computed.tensors().items():
                    assert torch.equal(stored[f"{linear.name}.{suffix}"], tensor.cpu())
    assert facts["sparsity"] == zeros / total >= 0.5
    assert facts["notes"]["quantize/made"]["quantized_linears"] == len(linears(source))
    row = subject(facts)
    assert (row.quantize_method, row.bits) == (recipe["method"], method.bits)
    assert row.group_size == method.group_size


@pytest.mark.parametrize("name", ["rtn-w3-asymmetric", "fp8-with-inputs", "mxfp4", "nvfp4"])
def test_pruning_after_quantization_is_dense_and_keeps_values(name, workspace):
    after = PRUNED | {"source": "quantize/made", "sparsity": 0.75}
    chosen = quantized("llama", RECIPES[name], prune_after=after)
    do(chosen, ["prune/half", "quantize/made", "prune/after"])
    facts = record("prune/after")
    assert facts["layout"] == "dense" and facts["sparsity"] >= 0.75
    before = load_model("quantize/made", chosen.run, dequantize=True)
    for linear in linears(load("prune/after")):
        source = before.get_parameter(f"{linear.name}.weight")
        kept = linear.weight != 0
        assert torch.equal(linear.weight[kept], source.cpu()[kept])
    assert subject(facts).bits is None


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_four_bit_floats_load_in_any_dtype(name, workspace):
    do(quantized("llama", RECIPES[name]))
    for dtype in (torch.float32, torch.float16):
        loaded = AutoModelForCausalLM.from_pretrained("data/models/quantize/made", dtype=dtype).eval()
        assert dense(loaded).dtype == dtype  # and its logits are finite
        assert all(linear.weight.any() for linear in linears(loaded))


@pytest.mark.parametrize("name", ["rtn-w3-asymmetric", "fp8-with-inputs", "mxfp4", "nvfp4", "nf4"])
def test_blocks_finished_before_a_kill_are_read_back(name, workspace, monkeypatch):
    chosen, file = quantized("llama", RECIPES[name]), Path("data/models/quantize/made/model.safetensors")
    do(chosen)
    whole, config = file.read_bytes(), (file.parent / "config.json").read_bytes()
    method = type(chosen.quantize["made"])
    original, calls = method.weights, 0

    def kill(self, weight, statistic):
        nonlocal calls
        calls += 1
        if calls == 8:  # the first linear of the second block
            raise KeyboardInterrupt
        return original(self, weight, statistic)

    monkeypatch.setattr(method, "weights", kill)
    with pytest.raises(KeyboardInterrupt):
        do(chosen, ["quantize/made"])
    do(chosen, ["quantize/made"])
    assert calls == 8 + 7  # the first block is not quantized again
    assert file.read_bytes() == whole and (file.parent / "config.json").read_bytes() == config


def test_inputs_are_rounded_where_the_checkpoint_says_so(workspace):
    do(quantized("llama", RECIPES["fp8-with-inputs"], "float32"))
    ids = torch.arange(16)[None]
    rounding, plain = load("quantize/made"), quantized("llama", {"method": "fp8"}, "float32")
    with torch.no_grad():
        rounded = rounding(input_ids=ids).logits
        do(plain)
        exact = load("quantize/made")(input_ids=ids).logits
    assert 0.001 < (rounded - exact).norm() / exact.norm() < 0.2


def test_inputs_that_no_format_would_round_are_refused(workspace):
    with pytest.raises(Refusal, match=r"fp8 does not serve gpt2, .*: no format runs Conv1D"):
        do(quantized("gpt2", RECIPES["fp8-with-inputs"]))


UNLOADED = {
    "falcon": FalconConfig(
        vocab_size=families.VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **families._IDS
    ),
    "gpt_bigcode": GPTBigCodeConfig(
        vocab_size=families.VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256, **families._IDS
    ),
}


@pytest.mark.parametrize("family", UNLOADED)
def test_families_that_do_not_load_packed_are_written_dense(family, workspace, monkeypatch):
    """Loading initializes modules, and in these families that reads the weights of linears."""
    monkeypatch.setitem(families.CONFIGS, family, UNLOADED[family])
    monkeypatch.setitem(families.IN_FEATURES, family, [32, 128])
    families.save(family, Path("inputs") / family)
    do(quantized(family, RECIPES["hqq-w4"]))
    assert record("quantize/made")["layout"] == "fake_quantized"
    for linear in linears(load("quantize/made")):
        assert max(len(group.unique()) for group in linear.weight.reshape(-1, 32)) <= 16
    with pytest.raises(Refusal, match=r"fp8 does not serve \w+ForCausalLM: transformers cannot load"):
        do(quantized(family, RECIPES["fp8-with-inputs"]))


def test_bits_per_weight_count_scales_and_zero_points(workspace):
    counts = {}
    for symmetric in (True, False):
        recipe = {"source": "base/tiny", "method": "rtn", "bits": 4, "group_size": 16, "symmetric": symmetric}
        do(params("llama", {"quantize/made": recipe | {"calibration": NONE}}))
        facts = record("quantize/made")
        counts[symmetric] = facts["bits_per_weight"] * facts["num_parameters"]
    weights = sum(linear.weight.numel() for linear in linears(load("base/tiny")))
    rest = record("quantize/made")["num_parameters"] - weights
    # The base has no zeros, and too few codes are zero for a bitmap to pay off.
    assert counts[True] == pytest.approx(weights * (4 + 16 / 16) + rest * 16, rel=1e-6)
    assert counts[False] == pytest.approx(weights * (4 + (16 + 4) / 16) + rest * 16, rel=1e-6)


def test_the_grid_of_a_pruning_recipe_is_recorded(workspace):
    recipe = {
        "source": "base/tiny", "method": "sparsegpt", "sparsity": 0.5, "calibration": TEXT,
        "grid": {"bits": 4, "group_size": 16},
    }  # fmt: skip
    do(params("llama", {"prune/joint": recipe}))
    row = subject(record("prune/joint"))
    assert (row.bits, row.group_size, row.layout) == (4, 16, "pack-quantized")
