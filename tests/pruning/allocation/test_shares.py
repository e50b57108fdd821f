"""Shares of all allocations: exact totals, refusals, and a written file that follows them."""

import itertools
import logging
import math
import operator
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.core.errors import Refusal
from stages.model.blocks import blocks, linears
from stages.pruning.allocation import layer_if
from stages.pruning.allocation.shares import budget, map_scores, solve
from tests import families
from tests.allocations import KINDS, by_block, shares
from tests.pipeline import NONE, TEXT, do, load, params, record


@pytest.mark.parametrize(("kind", "factor"), [("layer-if", math.nan), ("owl", 1e37)])
def test_scores_that_are_not_finite_are_refused_by_block(kind, factor):
    broken = families.model("llama").float()
    broken.requires_grad_(False).model.layers[1].mlp.down_proj.weight.mul_(factor)
    if kind == "owl":  # |W| times the norm overflows fp32, the inputs do not
        broken.model.layers[1].mlp.up_proj.weight.mul_(1e4)
    names = r"model\.layers\.0, model\.layers\.1" if kind == "layer-if" else r"model\.layers\.1"
    with pytest.raises(Refusal, match=rf"allocation {kind} has no finite score for {names}; check their"):
        shares(kind, broken, 0.5)


@pytest.mark.parametrize(
    ("kind", "options", "sparsity", "remedy"),
    [
        ("layer-if", {"low": 0.0}, 0.9, "a larger low"),
        ("alpha", {"spread": 0.9999}, 0.99, "a smaller spread"),
    ],
)
def test_a_sparsity_out_of_reach_is_refused(kind, options, sparsity, remedy, model):
    if kind == "layer-if":  # of few blocks, whose scores are not smoothed
        model = families.model("llama").float()
    others = 1 - 1 / len(blocks(model))
    with pytest.raises(Refusal, match=f"^sparsity {sparsity} cannot .*; use {remedy} or") as refusal:
        shares(kind, model, sparsity, **options)
    most = float(re.search(r"at most ([\d.]+)", str(refusal.value))[1])
    assert others - 1e-4 < most < sparsity
    shares(kind, model, most, **options)


def test_equal_scores_are_logged(caplog):
    logging.disable(logging.NOTSET)
    with caplog.at_level(logging.WARNING):
        map_scores("alpha", {"a": 0.5, "b": 0.25}, 0, 1)
        assert not caplog.text
        map_scores("owl", {"a": 0.25, "b": 0.25}, 0, 1)
    assert "allocation owl: all 2 blocks score 0.25, so all lose the same share" in caplog.text


@given(st.dictionaries(st.text(), st.floats(-1e6, 1e6), min_size=1), st.floats(-2, 2), st.floats(-2, 2))
def test_mapped_scores_span_the_range_in_their_order(scores, low, high):
    levels = map_scores("owl", scores, low, high)
    order = sorted(scores, key=scores.__getitem__)
    equal = scores[order[0]] == scores[order[-1]]
    assert levels[order[0]] == low
    assert levels[order[-1]] == pytest.approx(low if equal else high, abs=1e-9)
    for lower, higher in itertools.pairwise(order):
        assert (levels[higher] - levels[lower]) * (high - low) >= 0
    for broken in (math.nan, math.inf):
        with pytest.raises(Refusal, match="allocation owl has no finite score for it; "):
            map_scores("owl", scores | {"it": broken}, low, high)


@pytest.mark.numerics
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.5, 0.95])
@pytest.mark.parametrize("ignore", [(), ("mlp.gate_proj", "self_attn.v_proj")])
def test_the_mean_by_parameters_is_the_target(ignore, sparsity, kind, model):
    result = shares(kind, model, sparsity, ignore)
    sizes = {linear.name: linear.weight.numel() for linear in linears(model, ignore)}
    assert result.keys() == sizes.keys()
    assert all(0 <= share <= 1 for share in result.values())
    zeros = budget(result, sizes, sparsity, dict.fromkeys(sizes, 0))
    assert sum(zeros.values()) == math.floor(sum(sizes.values()) * sparsity + 1e-6)
    assert all(abs(zeros[name] - result[name] * size) <= 1 for name, size in sizes.items())


@pytest.mark.numerics
@pytest.mark.parametrize("kind", ["owl", "alpha", "layer-if"])
def test_equal_blocks_get_equal_shares(kind, monkeypatch):
    model = families.model("llama").float()
    first, second = (block for _, block in blocks(model))
    second.load_state_dict(first.state_dict())
    options = {"multiple": 1e6} if kind == "owl" else {}  # no outlier anywhere
    if kind == "layer-if":
        gradients = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr(layer_if, "sketches", lambda _, __, names: dict.fromkeys(names, gradients))
    assert by_block(model, shares(kind, model, 0.5, **options)) == pytest.approx([0.5, 0.5], abs=1e-9)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 500)), min_size=1, max_size=8), st.floats(0, 0.99))
def test_a_budget_is_met_exactly_and_nearly_everywhere(parts, sparsity):
    sizes = {str(i): size for i, (_, size) in enumerate(parts)}
    total = sum(sizes.values())
    raw = {str(i): share for i, (share, _) in enumerate(parts)}
    low, high = -1.0, 1.0
    for _ in range(80):  # shift the shares until their mean is the target
        middle = (low + high) / 2
        mean = sum(min(max(raw[n] + middle, 0), 1) * size for n, size in sizes.items()) / total
        low, high = (middle, high) if mean < sparsity else (low, middle)
    wanted = {name: min(max(raw[name] + high, 0.0), 1.0) for name in sizes}
    zeros = budget(wanted, sizes, sparsity, dict.fromkeys(sizes, 0))
    assert sum(zeros.values()) == math.floor(total * sparsity + 1e-6)
    for name, size in sizes.items():
        assert 0 <= zeros[name] <= size
        assert abs(zeros[name] - wanted[name] * size) <= 1 + 1e-6


def test_a_budget_of_wrong_shares_is_a_bug():
    with pytest.raises(ValueError, match=r"shares average 0\.25, not 0\.5"):
        budget({"a": 0.25, "b": 0.25}, {"a": 100, "b": 100}, 0.5, {"a": 0, "b": 0})


@given(st.data(), st.integers(1, 8))
def test_matrices_lose_less_where_others_have_more_zeros_than_their_share(data, count):
    sizes = {str(i): data.draw(st.integers(1, 500)) for i in range(count)}
    wanted = {name: data.draw(st.floats(0, 1)) for name in sizes}
    existing = {name: data.draw(st.integers(0, size)) for name, size in sizes.items()}
    total, exact = sum(sizes.values()), {name: wanted[name] * size for name, size in sizes.items()}
    target = math.floor(sum(exact.values()))
    zeros = budget(wanted, sizes, target / total, existing)
    assert sum(zeros.values()) == max(target, sum(existing.values()))
    assert all(existing[name] <= zeros[name] <= size for name, size in sizes.items())
    if sum(existing.values()) >= target:
        assert zeros == existing
        return
    low, high = 0.0, 1.0
    for _ in range(80):  # the factor by which all other matrices lose less
        factor = (low + high) / 2
        reached = sum(max(existing[name], factor * exact[name]) for name in sizes)
        low, high = (factor, high) if reached < target else (low, factor)
    assert all(abs(zeros[name] - max(existing[name], high * exact[name])) <= 1 + 1e-6 for name in sizes)


def test_shares_are_clamped_and_the_others_make_up_for_it():
    targets = linears(families.model("llama"))
    first, second = sorted({linear.block for linear in targets})
    result = solve({first: -0.5, second: 0.9}, operator.add, targets, 0.5, "")
    assert {result[linear.name] for linear in targets if linear.block == first} == {0.0}
    assert {result[linear.name] for linear in targets if linear.block == second} == {1.0}


RECIPES = {
    "magnitude": {"scope": "matrix"},
    "magnitude-row": {"method": "magnitude", "scope": "row"},
    "wanda": {},
    "sparsegpt": {},
    "random": {"seed": 0},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_written_file_has_the_planned_zeros(kind, recipe, workspace):
    options = {"method": recipe, "sparsity": 0.5, "source": "base/tiny"} | RECIPES[recipe]
    reads = recipe in ("wanda", "sparsegpt")
    calibration = TEXT if reads or kind in ("owl", "layer-if") else NONE
    chosen = params(
        "llama",
        {
            "prune/even": options | {"calibration": TEXT if reads else NONE},
            "prune/spread": options | {"allocation": {"kind": kind}, "calibration": calibration},
        },
    )
    do(chosen)
    planned = record("prune/spread")["notes"]["prune/spread"]["zeros"]
    spread, even = (
        {linear.name: int((linear.weight == 0).sum()) for linear in linears(load(artifact))}
        for artifact in ("prune/spread", "prune/even")
    )
    assert spread == planned
    assert sum(spread.values()) == sum(even.values())
    assert record("prune/spread")["sparsity"] == record("prune/even")["sparsity"] == 0.5
    assert any(abs(spread[name] - even[name]) > 10 for name in even)
    assert not list(Path("data/scratch").rglob("*.*"))


@pytest.mark.parametrize("recipe", ["wanda", "sparsegpt", "magnitude-row"])
@pytest.mark.parametrize("had", [0.25, 0.75])
def test_a_source_with_zeros_meets_the_target_or_a_warning_is_logged(had, recipe, workspace, caplog):
    """One threshold for all matrices leaves them, and their rows, with unequal numbers of zeros."""
    first = {"method": "magnitude", "sparsity": had, "scope": "global", "calibration": NONE}
    second = {"method": recipe, "sparsity": 0.5, "calibration": TEXT} | RECIPES[recipe]
    spread = {"source": "prune/first", "allocation": {"kind": "layer-if", "low": 0.01, "high": 0.9}}
    chosen = params(
        "llama", {"prune/first": first | {"source": "base/tiny"}, "prune/spread": second | spread}
    )
    do(chosen, [])
    model = load("base/tiny")
    for number, linear in enumerate(linears(model)):
        linear.weight.mul_(1 + number % 3)
    model.save_pretrained("data/models/base/tiny")
    logging.disable(logging.NOTSET)
    with caplog.at_level(logging.WARNING):
        for name in ("first", "spread"):
            chosen.prune[name].execute(f"prune/{name}", chosen.run)
    before, after = (
        {linear.name: int((linear.weight == 0).sum()) for linear in linears(load(f"prune/{name}"))}
        for name in ("first", "spread")
    )
    assert record("prune/spread")["notes"]["prune/spread"]["zeros"] == after
    assert record("prune/spread")["sparsity"] == max(had, 0.5)
    assert ("are already zero, more than the" in caplog.text) == (had > 0.5)
    assert (after == before) == (had > 0.5)
