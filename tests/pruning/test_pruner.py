"""Properties of all methods that prune single weights: exact counts, patterns, zeros that stay, settings."""

import importlib.util
import re
import sys
import textwrap
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.core.errors import Refusal
from stages.model.blocks import Linear, linears
from stages.pruning.allocation.uniform import Uniform
from stages.pruning.magnitude import Magnitude
from stages.pruning.wanda import Wanda
from tests import families
from tests.families import DEVICE
from tests.project import ROOT
from tests.pruners import (
    FLOORS,
    NONE,
    SPARSITY,
    TEXT,
    InMemorySource,
    hessian,
    magnitude,
    norms,
    problem,
    random,
    slow_mask,
    sparsegpt,
    wanda,
    weights,
    zeros_of,
)

pytestmark = pytest.mark.device


def linear_of(weight: torch.Tensor) -> Linear:
    linear = Linear(
        "block",
        "block.fc",
        torch.nn.Linear(*weight.T.shape, bias=False, device=weight.device),
        transposed=False,
    )
    linear.weight.copy_(weight)
    return linear


@pytest.mark.parametrize("structure", ["2:4", "4:8"])
def test_every_method_keeps_n_of_m(structure):
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (
        torch.randn(6, 64, generator=generator).to(DEVICE),
        torch.randn(200, 64, generator=generator).to(DEVICE),
    )
    size = int(structure[-1])
    for result in (
        magnitude(0.5, "matrix", structure=structure).weights(weight, None, 192),
        wanda(0.5, structure=structure).weights(weight, norms(torch.ones(64, device=DEVICE)), 192),
        sparsegpt(0.5, structure=structure).weights(weight, hessian(inputs), 192),
        random(0.5, structure=structure).replace(linear_of(weight), None, {"block.fc": 192}),
    ):
        assert ((result.view(-1, size) == 0).sum(1) == size // 2).all()


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.613, 0.99])
def test_under_uniform_every_matrix_loses_its_share_to_within_one_weight(sparsity, family):
    model = families.model(family)
    source = InMemorySource(model)
    sizes = {linear.name: linear.weight.numel() for linear in linears(model)}
    by_row = [wanda(sparsity), magnitude(sparsity, "row")]
    for method in (*by_row, magnitude(sparsity, "matrix"), sparsegpt(sparsity), random(sparsity)):
        plan = method.plan(source, pytest.fail)
        assert plan.keys() == sizes.keys()
        assert all(-1 < plan[name] - sparsity * size <= 1e-6 for name, size in sizes.items())
        assert method.notes(plan) == {}
    for method in by_row:
        floors = method.model_copy(update={"allocation": Uniform(kind="uniform", floor_rows=True)})
        plan = floors.plan(source, pytest.fail)
        for linear in linears(model):
            rows, columns = linear.weight.shape
            assert plan[linear.name] == rows * floor(columns * sparsity + 1e-6)


@given(weights())
def test_sparsity_zero_changes_nothing(weight):
    statistic = norms(torch.arange(1.0, weight.shape[1] + 1, device=DEVICE))
    inputs = torch.randn(50, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for result in (
        magnitude(0.0, "matrix").weights(weight, None, 0),
        magnitude(0.0, "row").weights(weight, None, 0),
        wanda(0.0).weights(weight, statistic, 0),
        sparsegpt(0.0).weights(weight, hessian(inputs), 0),
    ):
        assert torch.equal(result, weight)


def test_a_decimal_share_loses_no_weight_to_binary_rounding():
    # 10 * 0.3 and 10 * 0.7 fall on either side of whole numbers in binary.
    for sparsity, count in ((0.3, 3), (0.7, 7), (0.1, 1), (0.9, 9)):
        assert zeros_of(magnitude(sparsity, "matrix"), 1, 10) == count
        assert zeros_of(wanda(sparsity), 3, 10) == 3 * count


@settings(deadline=None)
@given(weights(), SPARSITY, st.sampled_from(["magnitude", "row", "wanda", "sparsegpt", "random"]))
def test_existing_zeros_stay_and_count(weight, sparsity, name):
    """Small integers hold many zeros, often more than the sparsity asks for."""
    columns = weight.shape[1]
    inputs = torch.randn(60, columns, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    count = zeros_of(magnitude(sparsity, "matrix"), *weight.shape)
    if name == "random":
        result = random(sparsity, seed=3).replace(linear_of(weight), None, {"block.fc": count})
    elif name == "sparsegpt":
        result = sparsegpt(sparsity).weights(weight, hessian(inputs), count)
    elif name == "wanda":
        result = wanda(sparsity).weights(weight, norms(inputs[0].abs() + 0.1), count)
    else:
        result = magnitude(sparsity, "row" if name == "row" else "matrix").weights(weight, None, count)
    existing = weight == 0
    assert (result[existing] == 0).all()
    assert int((result == 0).sum()) == max(count, int(existing.sum()))
    if name in ("wanda", "row"):  # rows end as level as their existing zeros allow
        before, after = existing.sum(1), (result == 0).sum(1)
        raised = after[after > before]
        assert not raised.numel() or int(raised.max()) <= int(after.min()) + 1


def test_a_pattern_that_divides_no_input_width_is_refused():
    source = InMemorySource(families.model("llama"))
    for method in (magnitude(0.75, "row", structure="6:24"), sparsegpt(0.75, structure="6:24")):
        message = (
            r"structure 6:24: 24 does not divide the input width of 14 linears: .*; choose an M that divides "
            r"every input width, or list these linears in ignore\.$"
        )
        with pytest.raises(Refusal, match=message):
            method.plan(source, pytest.fail)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "4:2"}, "N:M with N < M"),
        (
            {"structure": "2:4", "sparsity": 0.6},
            "structure 2:4 is a sparsity of 0.5, not 0.6; set sparsity: 0.5",
        ),
        ({"structure": "1:3", "sparsity": 0.6667}, "structure 1:3 is a sparsity of 0.666667, not 0.6667"),
        ({"structure": "2:4", "allocation": {"kind": "erk"}}, "leaves nothing to allocate"),
        ({"scope": "global", "structure": "2:4"}, "scope global is an allocation of its own"),
        ({"scope": "global", "allocation": {"kind": "erk"}}, "scope global is an allocation of its own"),
        ({"allocation": {"kind": "owl"}}, "allocation owl is measured on text; name a data set"),
        ({"allocation": FLOORS}, "floor_rows is for methods that compare"),
        ({"scope": "global", "allocation": FLOORS}, "floor_rows is for methods that compare"),
        ({"scope": "row", "structure": "2:4", "allocation": FLOORS}, "leaves nothing to allocate"),
        (
            {"allocation": {"kind": "layer-if"}, "calibration": TEXT | {"batch_size": 2}},
            "allocation layer-if takes one window at a time; leave batch_size out",
        ),
        (
            {"calibration": {"dataset": "news"}},
            "must be {dataset: none}, as no part of this recipe reads text",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, message):
    recipe = {
        "source": "base/m", "method": "magnitude", "scope": "matrix", "sparsity": 0.5, "calibration": NONE,
    } | options  # fmt: skip
    with pytest.raises(ValidationError) as refusal:
        Magnitude.model_validate(recipe)
    assert message in str(refusal.value)


def test_a_batch_size_is_allowed_if_something_takes_windows_in_batches():
    layer_if = {"allocation": {"kind": "layer-if"}}
    text = TEXT | {"batch_size": 2, "sequential": "block"}
    assert Wanda(source="base/m", method="wanda", sparsity=0.5, calibration=text, **layer_if)
    generated = {"tokens": "generated", "seed": 0, "temperature": 1.0, "prompt_length": 4}
    for options, more in ((layer_if, generated), ({"allocation": {"kind": "owl"}}, {})):
        recipe = {
            "source": "base/m", "method": "magnitude", "sparsity": 0.5, "scope": "row",
            "calibration": TEXT | {"batch_size": 2} | more,
        } | options  # fmt: skip
        assert Magnitude.model_validate(recipe).calibration.batch_size == 2


def test_floors_of_rows_are_refused_if_rows_are_not_compared():
    for method in (sparsegpt, random):
        with pytest.raises(ValidationError, match="floor_rows is for methods that compare"):
            method(0.5, allocation=FLOORS)


def test_the_method_of_the_contributors_guide_works(tmp_path, monkeypatch):
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    file = tmp_path / "cube.py"
    file.write_text(textwrap.dedent(snippet))
    spec = importlib.util.spec_from_file_location("cube", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cube", module)
    spec.loader.exec_module(module)
    weight, inputs = problem(seed=0, rows=6, columns=32, tokens=40)
    method = module.Cube(source="base/m", method="cube", sparsity=0.4, calibration=TEXT)
    result = method.weights(weight, norms(inputs[0]), zeros_of(method, 6, 32))
    scores = (weight.abs() ** 3 * inputs[0].abs()).flatten().tolist()
    mask = torch.tensor(slow_mask(scores, 76), device=DEVICE).view_as(weight)
    assert torch.equal(result, torch.where(mask, 0, weight))
