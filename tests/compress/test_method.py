"""Methods end to end: their text, their log of dead features, and their refusals."""

import logging
from typing import Any

import pytest
import torch

from stages.compress import method
from stages.core.errors import Refusal
from stages.core.run import Run
from stages.model.blocks import linears
from stages.pruning.magnitude import Magnitude
from tests import families
from tests.pipeline import NONE, TEXT, do, load, params, record
from tests.recipes import GPTQ, SPARSEGPT, WANDA
from tests.streaming import PRUNE, execute, leftovers

GENERATED = TEXT | {"tokens": "generated", "seed": 0, "temperature": 1.0, "prompt_length": 4}


def test_a_method_needs_only_weights(workspace):
    """A weight method's function knows nothing of modules, files or devices."""
    do(params("llama", {}))
    recipe = Magnitude(
        source="base/tiny", method="magnitude", sparsity=0.5, scope="row", calibration=NONE,
        ignore=("mlp.up_proj",),
    )  # fmt: skip
    run = Run(device=families.DEVICE, dtype="bfloat16", threads=1, seed=0, numerics="fast")
    recipe.execute("prune/own", run)
    for linear, before in zip(linears(load("prune/own")), linears(load("base/tiny")), strict=True):
        alone = recipe.weights(before.weight, None, before.weight.numel() // 2)
        untouched = linear.name.endswith("up_proj")
        assert torch.equal(linear.weight, before.weight if untouched else alone)


def test_nothing_is_generated_for_a_recipe_that_is_refused(workspace, monkeypatch):
    monkeypatch.setattr(method, "model_windows", lambda *_: pytest.fail("generated"))
    with pytest.raises(Refusal, match="24 does not divide the input"):
        execute(WANDA | {"structure": "6:24", "sparsity": 0.75, "calibration": GENERATED})
    assert not leftovers()


def test_windows_are_generated_once(workspace, monkeypatch):
    """An allocation that reads text and the method's statistic see the same windows."""
    windows: list[torch.Tensor] = []
    original = method.model_windows

    def watch(*args: Any) -> torch.Tensor:
        windows.append(original(*args))
        return windows[-1]

    monkeypatch.setattr(method, "model_windows", watch)
    execute(WANDA | {"allocation": {"kind": "owl", "multiple": 2.0}, "calibration": GENERATED})
    assert len(windows) == 1


@pytest.mark.parametrize("sparsity", [0.3, 0.613])
@pytest.mark.parametrize("floor_rows", [False, True])
@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_rows_lose_their_share_or_its_floor(name, floor_rows, sparsity, workspace):
    evenly = {"allocation": {"kind": "uniform", "floor_rows": floor_rows}, "sparsity": sparsity}
    execute(PRUNE[name] | evenly | ({"scope": "row"} if name == "magnitude" else {}))
    zeros = total = 0
    for linear in linears(load("prune/made")):
        (rows, columns), each = linear.weight.shape, (linear.weight == 0).sum(1)
        zeros, total = zeros + int(each.sum()), total + linear.weight.numel()
        if floor_rows:
            assert each.tolist() == [int(columns * sparsity + 1e-6)] * rows
        else:
            assert int(each.sum()) == int(rows * columns * sparsity + 1e-6)
            assert int(each.max()) - int(each.min()) <= 1
    assert record("prune/made")["sparsity"] == zeros / total
    assert (zeros / total < sparsity - 0.005) if floor_rows else (0 <= sparsity * total - zeros < 14)


def test_scores_that_are_nan_are_refused_by_name(workspace, monkeypatch):
    monkeypatch.setattr(
        "stages.pruning.wanda.wanda_scores", lambda weight, norm: lambda rows: weight[rows] * torch.nan
    )
    with pytest.raises(Refusal, match=r"model\.layers\.0\.self_attn\.q_proj: .*NaN"):
        execute(WANDA)
    assert not leftovers()


def silence(model: torch.nn.Module) -> None:
    """Make five input features of the second block's mlp zero on every token."""
    model.model.layers[1].post_attention_layernorm.weight.data[:5] = 0


@pytest.mark.parametrize(
    ("section", "recipe", "fate"),
    [
        ("prune", WANDA, "the first of their row to go"),
        ("prune", SPARSEGPT, "the first to go, as far as the sparsity reaches"),
        ("quantize", GPTQ, "rounded as they are"),
    ],
    ids=["wanda", "sparsegpt", "gptq"],
)
def test_weight_methods_log_dead_features_once_per_linear(section, recipe, fate, workspace, caplog):
    do(params("llama", {}))
    model = load("base/tiny")
    silence(model)
    model.save_pretrained("data/models/base/tiny")
    logging.disable(logging.NOTSET)
    with caplog.at_level(logging.INFO):
        execute(recipe, section)
    for linear in ("gate_proj", "up_proj"):
        line = f"model.layers.1.mlp.{linear}: 5 of 32 input features are zero on every token; "
        assert caplog.text.count(line) == 1
        assert f"{line}their weights are {fate}" in caplog.text
    assert caplog.text.count("on every token") == 2
    if section == "prune":
        gate = load("prune/made").model.layers[1].mlp.gate_proj.weight
        assert (gate[:, :5] == 0).all() and int((gate == 0).sum()) == gate.numel() / 2


@pytest.mark.parametrize(
    ("recipe", "silent", "message"),
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
                "calibration": GENERATED | {"prompt_length": 8},
            },
            ["gate_proj", "up_proj", "down_proj"],
            "get no gradient from the generated tokens; their weights are the first to go",
        ),
    ],
    ids=["width", "stepwise", "resp"],
)  # fmt: skip
def test_whole_model_methods_log_dead_features_once_per_linear(recipe, silent, message, workspace, caplog):
    do(params("llama", {}))
    model = load("base/tiny")
    silence(model)
    model.model.layers[1].mlp.gate_proj.weight.data[:5] = 0  # so that down_proj reads zeros
    model.save_pretrained("data/models/base/tiny")
    logging.disable(logging.NOTSET)
    with caplog.at_level(logging.INFO):
        execute({"calibration": TEXT, **recipe})
    width = model.config.intermediate_size
    for linear in silent:
        line = f"model.layers.1.mlp.{linear}: 5 of {width if linear == 'down_proj' else 32} input features "
        assert caplog.text.count(f"{line}{message}") == 1
    assert caplog.text.count("input features") == len(silent)
