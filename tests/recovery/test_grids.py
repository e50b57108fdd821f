"""The grid of a quantized source: read back, rounded to again, and written packed."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from stages.core.errors import Refusal
from stages.corpus import examples
from stages.corpus.examples import Train
from stages.model import artifact
from stages.model.blocks import linears
from stages.model.floats import Float8, MXFloat4, NVFloat4
from stages.model.grid import Codes, Int8, Integers, Quantized, bounds
from stages.recovery.training import held_out_loss
from tests.pipeline import NONE, STAGES, TEXT, dense, do, load, params, record

pytestmark = pytest.mark.device

SEED = st.integers(0, 2**31)


def drawn(seed: int, rows: int = 6, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def grids(weight: torch.Tensor) -> dict[str, Quantized]:
    """Return `weight` in every format a file holds."""
    whole = Integers(8, None).nearest(weight)
    return {
        **{
            f"{bits} bits {symmetric}": Integers(bits, 16, symmetric).nearest(weight)
            for bits in (2, 3, 4, 6)
            for symmetric in (True, False)
        },
        "int8": Int8(whole.codes, whole.scale),
        "fp8": Float8.nearest(weight, by_row=True, dynamic=False),
        "mxfp4": MXFloat4.nearest(weight),
        "nvfp4": NVFloat4.nearest(weight),
    }


@settings(deadline=None, max_examples=20)
@given(SEED, st.sampled_from([torch.bfloat16, torch.float32]))
def test_values_on_a_grid_keep_their_codes_and_zero_stays_zero(seed, dtype):
    for name, code in grids(drawn(seed).to(dtype)).items():
        values = code.dequantize()
        again = code.requantize(values)
        assert type(again) is type(code) and torch.equal(again.dequantize(), values), name
        assert all(
            torch.equal(tensor.float(), getattr(code, field).float())
            for field, tensor in vars(again).items()
            if isinstance(tensor, torch.Tensor)
        ), name
        assert not code.requantize(torch.zeros_like(values)).dequantize().any(), name


@settings(deadline=None, max_examples=20)
@given(SEED)
def test_a_weight_goes_to_the_nearest_point_of_a_grid_fitted_to_another(seed):
    """Compared with every point of the grid, value by value."""
    weight = drawn(seed + 1, 2, 32) * 1.5
    for name, code in grids(drawn(seed, 2, 32)).items():
        if name == "fp8":
            continue  # 256 points are the dtype's own
        if isinstance(code, Codes):
            low, high = bounds(code.bits)
            levels = [float(point) for point in range(low, high + 1)]
        else:
            levels = [sign * level for level in (0, 0.5, 1, 1.5, 2, 3, 4, 6) for sign in (1, -1)]
        filled = [replace(code, codes=torch.full_like(code.codes, level)) for level in levels]
        points = torch.stack([level.dequantize().float() for level in filled])
        nearest = (points - weight).abs().amin(0)
        rounded = code.requantize(weight).dequantize().float()
        slack = 2**-7 * rounded.abs().max()  # values are rounded to the dtype they are stored in
        assert ((rounded - weight).abs() <= nearest + slack).all(), name


@given(SEED, st.sampled_from([2, 3, 4]), st.booleans())
def test_inside_is_where_clamping_changes_nothing(seed, bits, symmetric):
    code = Integers(bits, 16, symmetric).nearest(drawn(seed))
    weight = drawn(seed + 1) * 2
    low, high = bounds(bits)
    zero = torch.zeros_like(code.scale) if code.zero_point is None else code.zero_point.float()
    wide = [value.repeat_interleave(16, 1) for value in (code.scale, zero)]
    unclamped = (weight / wide[0]).round() + wide[1]
    assert torch.equal(code.inside(weight), (unclamped >= low) & (unclamped <= high))
    assert 0 < code.inside(weight).float().mean() < 1


NEWS = {"dataset": "news", "num_samples": 4, "sequence_length": 32, "held_out": 2}
BLOCK = TEXT | {"sequential": "block"}
SHORT = {"train": NEWS, "steps": 3, "batch_size": 2, "learning_rate": 0.02}
LORA = {"method": "lora", "rank": 2, "alpha": 4, **SHORT}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "rtn": {"bits": 3, "group_size": 16, "symmetric": False, "calibration": NONE},
    "awq": {"bits": 4, "group_size": 32, "calibration": BLOCK},
    "smoothquant": {"calibration": BLOCK},
    "fp8": {"calibration": NONE},
    "mxfp4": {"calibration": NONE},
    "nvfp4": {"calibration": NONE},
}
INTEGERS = ["rtn", "awq", "smoothquant"]


def recover(quantizer: str, tuning: dict[str, Any], family: str = "llama") -> None:
    """Quantize the tiny model into quantize/source and tune that into finetune/result."""
    recipes = {
        "quantize/source": {"source": "base/tiny", "method": quantizer, **QUANTIZERS[quantizer]},
        "finetune/result": {"source": "quantize/source", **tuning},
    }
    do(params(family, recipes), list(recipes))


def stored(name: str) -> dict[str, torch.Tensor]:
    return load_file(Path("data/models") / name / "model.safetensors")


@pytest.mark.parametrize(
    ("quantizer", "tuning"),
    [(quantizer, LORA | {"keep": "none", "requantize": True}) for quantizer in QUANTIZERS]
    + [("rtn", {"method": "full", "keep": "mask", "requantize": True, **SHORT})]
    + [(quantizer, {"method": method, **SHORT}) for quantizer in INTEGERS for method in ("qat", "eco")],
    ids=lambda value: value if isinstance(value, str) else value["method"],
)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_result_is_packed_on_the_grid_of_its_source(family, quantizer, tuning, workspace):
    recover(quantizer, tuning, family)
    source, result = record("quantize/source"), record("finetune/result")
    assert result["layout"] == source["layout"] and source["layout"] not in ("dense", "fake_quantized")
    assert result["bits_per_weight"] == pytest.approx(source["bits_per_weight"], rel=0.01)
    before, after = stored("quantize/source"), stored("finetune/result")
    assert before.keys() == after.keys()
    fixed = ("_scale", "_zero_point", "_global_scale", "_shape")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name.endswith(fixed))
    codes = [name for name in before if name.removesuffix("_packed") + "_scale" in before]
    changed = [name for name in codes if not torch.equal(before[name].float(), after[name].float())]
    assert codes and changed
    weights = [dense(load(name)) for name in ("quantize/source", "finetune/result")]
    for linear in linears(weights[0], partial=True):
        first, last = (model.get_submodule(linear.name).weight for model in weights)
        assert last.isfinite().all()
        if tuning.get("keep", "mask") == "mask":
            assert not last[first == 0].any()


@pytest.mark.numerics
def test_the_recorded_loss_is_that_of_the_file(workspace):
    tuning = LORA | {"keep": "none", "requantize": True}
    recover("rtn", tuning)
    model = dense(load("finetune/result"))
    chosen = Train.model_validate(tuning["train"])
    rows = examples.load_examples(chosen, artifact.load_tokenizer("finetune/result"), model.config).held_out
    expected = held_out_loss(model, rows, 2)
    recorded = record("finetune/result")["notes"]["finetune/result"]["held_out_loss"]
    assert recorded == pytest.approx(expected, rel=1e-3)  # the stage computes in bf16
    with Path("data/curves/result.csv").open() as file:
        trained = float(list(csv.DictReader(file))[-1]["heldout_loss"])
    assert abs(trained - recorded) > 10 * abs(expected - recorded)  # rounding changed it


def test_without_requantize_the_result_is_dense(workspace):
    recover("rtn", LORA | {"keep": "none", "requantize": False})
    assert record("finetune/result")["layout"] == "dense"
    assert not any(name.endswith("_scale") for name in stored("finetune/result"))


@pytest.mark.parametrize(
    ("source", "tuning", "message"),
    [
        ("rtn", LORA, "quantize/source is quantized; add requantize: true"),
        (None, LORA | {"requantize": True}, "base/tiny is dense and has no grid; leave it out"),
        (None, {"method": "qat", **SHORT}, "qat trains on its source's grid, but base/tiny is dense"),
        ("mxfp4", {"method": "eco", **SHORT}, "eco serves grids of integers, but .* is mxfp4-pack-quantized"),
        ("nf4", {"method": "qat", **SHORT}, "fake_quantized: no format holds its codes"),
        ("nf4", LORA | {"requantize": True}, "requantize cannot be true: quantize/source is fake_quantized"),
    ],
)
def test_a_recipe_that_does_not_fit_its_source_is_refused_before_a_weight_is_read(
    source, tuning, message, workspace, monkeypatch
):
    recipes = {"finetune/result": {"source": "quantize/source" if source else "base/tiny", **tuning}}
    if source:
        options = {"nf4": {"group_size": 32, "calibration": NONE}, **QUANTIZERS}[source]
        recipes = {"quantize/source": {"source": "base/tiny", "method": source, **options}, **recipes}
    chosen = params("llama", recipes)
    do(chosen, list(recipes)[:-1])
    monkeypatch.setattr(artifact, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(Refusal, match=message):
        STAGES["finetune"](chosen, "result")
    assert not Path("data/models/finetune").exists()
