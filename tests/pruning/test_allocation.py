"""Allocations: published formulas worked out by hand, exact totals, and the written file follows them."""

import copy
import itertools
import logging
import math
import operator
import re
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy.signal import savgol_filter
from transformers import AutoModelForCausalLM, LlamaConfig

from stages.core.errors import Refusal
from stages.model.blocks import blocks, linears
from stages.pruning.allocation import layer_if
from stages.pruning.allocation.alpha import hill, spectrum_of
from stages.pruning.allocation.kinds import AnyAllocation
from stages.pruning.allocation.layer_if import influence
from stages.pruning.allocation.shares import budget, map_scores, solve
from stages.pruning.gradients import sketches
from tests import families
from tests.pipeline import NONE, TEXT, do, load, params, record
from tests.pruning.test_pruner import Whole

METHODS = ("erk", "owl", "alpha", "layer-if")
DEPTH = 6


def allocation(method: str, **options) -> AnyAllocation:
    return TypeAdapter(AnyAllocation).validate_python({"kind": method, **options})


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """Six blocks that differ in how large, how outlying and how skewed their weights are."""
    torch.manual_seed(0)
    config = LlamaConfig(**families._GATED | {"num_hidden_layers": DEPTH}, tie_word_embeddings=True)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for number, linear in enumerate(linears(made)):
        block = int(linear.block.rpartition(".")[2])
        draw = torch.Generator().manual_seed(number)
        loud = torch.rand(linear.weight.shape, generator=draw) < 0.01 * (block % 4)
        linear.weight.mul_(1 + 30 * loud)
        linear.weight.mul_(torch.linspace(1, 4 + 3 * block, len(linear.weight))[:, None])
    return made


class Source(Whole):
    """A source in memory with what an allocation asks of a streamed one."""

    def bring_rest(self) -> None: ...

    def whole(self) -> torch.nn.Module:
        return self.model


def tokens(count: int = 6) -> torch.Tensor:
    return torch.randint(0, 256, (count, 16), generator=torch.Generator().manual_seed(1))


def shares(method: str, model: torch.nn.Module, sparsity: float, **options) -> dict[str, float]:
    return allocation(method, **options).shares(Source(model), (), sparsity, tokens())


def by_block(model: torch.nn.Module, found: dict[str, float]) -> list[float]:
    """The one share of each block's linears."""
    made = []
    for name, _ in blocks(model):
        values = {found[linear.name] for linear in linears(model) if linear.block == name}
        assert len(values) == 1
        made += values
    return made


def slow_owl(model: torch.nn.Module, sparsity: float, multiple: float, spread: float) -> list[float]:
    """2310.05175: inputs of one plain forward; blocks are alike in size, so the plain mean is the target."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        linear.module.register_forward_hook(
            lambda module, args, output, name=linear.name: seen.update({name: args[0].double()})
        )
        for linear in linears(model)
    ]
    with torch.no_grad():
        model(input_ids=tokens(), use_cache=False)
    for handle in handles:
        handle.remove()
    ratios = []
    for block, _ in blocks(model):
        scores = torch.cat(
            [
                (one.weight.double().abs() * seen[one.name].reshape(-1, one.weight.shape[1]).norm(dim=0)
                 / math.sqrt(tokens().numel())).flatten()
                for one in linears(model) if one.block == block
            ]
        )  # fmt: skip
        ratios.append(float((scores > multiple * scores.mean()).double().mean()))
    scaled = [2 * spread * (ratio - min(ratios)) / (max(ratios) - min(ratios)) for ratio in ratios]
    return [1 - (one - sum(scaled) / DEPTH + 1 - sparsity) for one in scaled]


def test_owl_is_the_papers_formula(model):
    found = by_block(model, shares("owl", model, 0.6, multiple=4.0, spread=0.1))
    assert found == pytest.approx(slow_owl(model, 0.6, 4.0, 0.1), abs=1e-6)
    assert max(found) - min(found) == pytest.approx(0.2)


def slow_hill(eigenvalues: list[float]) -> float:
    """1 + k / sum over the k largest of ln(largest_i / the one before them), k half of all."""
    descending = sorted(eigenvalues, reverse=True)
    k = len(descending) // 2
    return 1 + k / sum(math.log(descending[i] / descending[k]) for i in range(k))


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=30, unique=True))
def test_hill_is_the_papers_estimator(values):
    ordered = sorted(values, reverse=True)
    assume(ordered[0] > 1.001 * ordered[len(ordered) // 2])  # a tail of equal values has no exponent
    assert hill(torch.tensor(values, dtype=torch.float64)) == pytest.approx(slow_hill(values), rel=1e-6)


def test_hill_finds_the_exponent_of_a_power_law():
    # Quantiles of a density that falls like x^-3.
    law = (1 - torch.linspace(0, 0.9999, 20001, dtype=torch.float64)) ** (-1 / 2)
    assert hill(law) == pytest.approx(3, abs=0.05)


def test_alpha_is_the_papers_formula(model):
    found = by_block(model, shares("alpha", model, 0.5, spread=0.25))
    exponents = []
    for block, _ in blocks(model):
        spectra = [
            torch.linalg.eigvalsh(one.weight.double() @ one.weight.double().T)
            if one.weight.shape[0] <= one.weight.shape[1]
            else torch.linalg.eigvalsh(one.weight.double().T @ one.weight.double())
            for one in linears(model)
            if one.block == block
        ]
        exponents.append(sum(slow_hill(spectrum.tolist()) for spectrum in spectra) / len(spectra))
    low, high = min(exponents), max(exponents)
    raw = [(one - low) / (high - low) * 0.5 + 0.75 for one in exponents]
    assert found == pytest.approx([one * 0.5 * DEPTH / sum(raw) for one in raw], rel=1e-3)
    # The heavier the tail, that is the smaller the exponent, the less is lost.
    assert found.index(min(found)) == exponents.index(low)


def test_erk_is_the_papers_formula(model):
    found = shares("erk", model, 0.5)
    sizes = {linear.name: linear.weight.shape for linear in linears(model)}
    raw = {name: (rows + columns) / (rows * columns) for name, (rows, columns) in sizes.items()}
    budget_ = 0.5 * sum(rows * columns for rows, columns in sizes.values())
    factor = budget_ / sum(rows + columns for rows, columns in sizes.values())
    assert max(factor * one for one in raw.values()) < 1  # none is left whole at this sparsity
    assert found == pytest.approx({name: 1 - factor * one for name, one in raw.items()})


def test_erk_leaves_whole_what_would_keep_more_than_all_and_makes_up_elsewhere(model):
    found = shares("erk", model, 0.2)
    sizes = {linear.name: linear.weight.numel() for linear in linears(model)}
    whole = [name for name, share in found.items() if share == 0]
    assert {name.rpartition(".")[2] for name in whole} == {"k_proj", "v_proj"}
    assert sum(found[name] * size for name, size in sizes.items()) == pytest.approx(0.2 * sum(sizes.values()))
    rest = {name: share for name, share in found.items() if share}
    kept = {
        name: (1 - share) * sizes[name] / sum(linear.weight.shape)
        for linear in linears(model)
        for name, share in rest.items()
        if name == linear.name
    }
    assert max(kept.values()) == pytest.approx(min(kept.values()))


def slow_influence(ours: torch.Tensor, held: torch.Tensor) -> float:
    """DataInf (2310.00902), equation 5, term by term."""
    n, d = ours.shape
    damping = 0.1 * sum(float(g @ g) / d for g in ours) / n
    v, total = held.mean(0), 0.0
    for k in range(n):
        terms = [(v @ ours[k] - (v @ g) * (g @ ours[k]) / (damping + g @ g)) / damping for g in ours]
        total += max(0.0, float(sum(terms)) / n)
    return total


@pytest.mark.parametrize("seed", range(5))
def test_influence_is_datainfs(seed):
    draw = torch.Generator().manual_seed(seed)
    vectors = torch.randn(8, 20, generator=draw, dtype=torch.float64) + torch.randn(20, generator=draw)
    assert influence(vectors, 20) == pytest.approx(slow_influence(vectors[:4], vectors[4:]))


def test_a_helpful_half_has_more_influence_than_a_harmful_one():
    g = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)) * 0.1
    helpful, harmful = torch.cat([g + noise, g + noise]), torch.cat([g + noise, -g + noise])
    assert influence(helpful, 50) > influence(harmful, 50)


def exact_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Each window's whole gradient in each block, `[windows, parameters of the block]`."""
    out: dict[str, list[torch.Tensor]] = {name: [] for name, _ in blocks(model)}
    model.requires_grad_(True)
    for window in tokens():
        model.zero_grad()
        model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
        for name, block in blocks(model):
            out[name].append(torch.cat([p.grad.flatten() for p in block.parameters()]).double())
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return {name: torch.stack(rows) for name, rows in out.items()}


def test_sketches_keep_dot_products(model):
    whole = exact_gradients(model)
    small = sketches(model, tokens(), list(whole))
    for name, exact in whole.items():
        scale = exact.norm(dim=1).max() ** 2
        assert (small[name].double() @ small[name].double().T - exact @ exact.T).abs().max() < 0.05 * scale


def test_layer_if_is_the_papers_formula(model, monkeypatch):
    whole = exact_gradients(model)
    monkeypatch.setattr(layer_if, "sketches", lambda model, windows, names: {n: whole[n] for n in names})
    found = by_block(model, shares("layer-if", model, 0.5))
    scores = torch.tensor([slow_influence(whole[n][:3], whole[n][3:]) for n, _ in blocks(model)])
    scores = ((scores - scores.min()) / (scores.max() - scores.min())).numpy()
    smooth = savgol_filter(scores, 5, 2).clip(0, 1)
    raw = (1 - smooth) * (0.40 - 0.05) + 0.05
    expected = raw * 0.5 / raw.mean()
    if expected.max() <= 1:
        assert found == pytest.approx(expected.tolist(), rel=1e-4)
    else:  # what would be more than everything is spread over the rest
        assert max(found) == 1 and sum(found) / DEPTH == pytest.approx(0.5)


@pytest.mark.parametrize(("method", "factor"), [("layer-if", math.nan), ("owl", 1e37)])
def test_scores_that_are_no_numbers_are_refused_by_block(method, factor):
    broken = families.model("llama").float()
    broken.requires_grad_(False).model.layers[1].mlp.down_proj.weight.mul_(factor)
    if method == "owl":  # |W| times the norm is more than fp32 holds, the inputs are not
        broken.model.layers[1].mlp.up_proj.weight.mul_(1e4)
    blocks_ = r"model\.layers\.0, model\.layers\.1" if method == "layer-if" else r"model\.layers\.1"
    with pytest.raises(Refusal, match=rf"allocation {method} has no finite score for {blocks_}; check their"):
        allocation(method).shares(Source(broken), (), 0.5, tokens())


def test_alpha_takes_weights_whose_squares_fp32_does_not_hold(model):
    found = by_block(model, shares("alpha", model, 0.5))
    large = copy.deepcopy(model)
    for one in linears(large):
        one.weight.mul_(2.0**70)
    assert by_block(large, shares("alpha", large, 0.5)) == pytest.approx(found, rel=1e-4)


def test_alpha_looks_at_what_a_matrix_has_beside_zero(model, caplog):
    """A matrix of low rank has the exponent of its rank, one of zeros or of rank one has none."""
    draw = torch.Generator().manual_seed(0)
    tall, wide = torch.randn(48, 12, generator=draw).double(), torch.randn(12, 64, generator=draw).double()
    found = spectrum_of((tall @ wide).float())
    exact = torch.linalg.svdvals(tall @ wide)[:12] ** 2
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=0)
    assert hill(found) == pytest.approx(slow_hill(exact.tolist()), rel=1e-4)
    assert [len(spectrum_of(w)) for w in (torch.zeros(4, 8), torch.ones(4, 8), torch.eye(4, 8))] == [0, 1, 4]
    assert spectrum_of(torch.tensor([[1.0, math.nan], [1, 1]])).isnan().all()
    broken = copy.deepcopy(model)
    broken.model.layers[2].mlp.gate_proj.weight.data.zero_()
    broken.model.layers[2].mlp.up_proj.weight.data.fill_(0.1)
    logging.disable(logging.NOTSET)
    with caplog.at_level(logging.WARNING):
        shared = by_block(broken, shares("alpha", broken, 0.5))
    exponents = []
    for name, _ in blocks(broken):
        spectra = [spectrum_of(one.weight) for one in linears(broken) if one.block == name]
        each = [slow_hill(one.tolist()) for one in spectra if len(one) > 1]
        exponents.append(sum(each) / len(each))
    low, high = min(exponents), max(exponents)
    raw = [0.7 + 0.6 * (one - low) / (high - low) for one in exponents]
    assert shared == pytest.approx([one * 0.5 * DEPTH / sum(raw) for one in raw], rel=1e-3)
    for name, rank in (("gate", 0), ("up", 1)):
        assert f"alpha: model.layers.2.mlp.{name}_proj has rank {rank}, no exponent" in caplog.text
    for one in linears(broken):
        if one.block == "model.layers.2":
            one.weight.zero_()
    with pytest.raises(
        Refusal, match=r"alpha: no matrix of model\.layers\.2 has two nonzero singular values"
    ):
        shares("alpha", broken, 0.5)


@pytest.mark.parametrize(
    ("method", "options", "sparsity", "change"),
    [
        ("layer-if", {"low": 0.0}, 0.9, "a larger low"),
        ("alpha", {"spread": 0.9999}, 0.99, "a smaller spread"),
    ],
)
def test_a_sparsity_out_of_reach_is_refused(method, options, sparsity, change, model):
    if method == "layer-if":  # of few blocks, whose scores are not smoothed
        model = families.model("llama").float()
    others = 1 - 1 / len(blocks(model))
    said = rf"^sparsity {sparsity} cannot .*; use {change} or"
    with pytest.raises(Refusal, match=said) as told:
        shares(method, model, sparsity, **options)
    most = float(re.search(r"at most ([\d.]+)", str(told.value))[1])
    assert others - 1e-4 < most < sparsity
    shares(method, model, most, **options)


def test_scores_that_are_all_alike_are_told(caplog):
    logging.disable(logging.NOTSET)
    with caplog.at_level(logging.WARNING):
        map_scores("alpha", {"a": 0.5, "b": 0.25}, 0, 1)
        assert not caplog.text
        map_scores("owl", {"a": 0.25, "b": 0.25}, 0, 1)
    assert "allocation owl: all 2 blocks score 0.25, so all lose the same share" in caplog.text


@given(st.dictionaries(st.text(), st.floats(-1e6, 1e6), min_size=1), st.floats(-2, 2), st.floats(-2, 2))
def test_scaled_scores_span_what_is_asked_in_their_order(scores, low, high):
    found = map_scores("owl", scores, low, high)
    least, most = min(scores, key=scores.__getitem__), max(scores, key=scores.__getitem__)
    assert found[least] == low
    assert found[most] == pytest.approx(high if scores[least] < scores[most] else low, abs=1e-9)
    for one, other in itertools.pairwise(sorted(scores, key=scores.__getitem__)):
        assert (found[other] - found[one]) * (high - low) >= 0
    for broken in (math.nan, math.inf):
        with pytest.raises(Refusal, match="allocation owl has no finite score for it; "):
            map_scores("owl", scores | {"it": broken}, low, high)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.5, 0.95])
@pytest.mark.parametrize("ignore", [(), ("mlp.gate_proj", "self_attn.v_proj")])
def test_the_mean_by_parameters_is_the_target(ignore, sparsity, method, model):
    found = allocation(method).shares(Source(model), ignore, sparsity, tokens())
    sizes = {linear.name: linear.weight.numel() for linear in linears(model, ignore)}
    assert found.keys() == sizes.keys()
    assert all(0 <= share <= 1 for share in found.values())
    zeros = budget(found, sizes, sparsity, dict.fromkeys(sizes, 0))
    assert sum(zeros.values()) == math.floor(sum(sizes.values()) * sparsity + 1e-6)
    assert all(abs(zeros[name] - found[name] * size) <= 1 for name, size in sizes.items())


@pytest.mark.parametrize("method", ["owl", "alpha", "layer-if"])
def test_blocks_that_are_all_alike_get_the_same_share(method, model, monkeypatch):
    alike = families.model("llama").float()
    first, second = (block for _, block in blocks(alike))
    second.load_state_dict(first.state_dict())
    if method == "owl":  # no outlier anywhere
        found = shares(method, alike, 0.5, multiple=1e6)
    elif method == "layer-if":
        one = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr(layer_if, "sketches", lambda model, windows, names: dict.fromkeys(names, one))
        found = shares(method, alike, 0.5)
    else:
        found = shares(method, alike, 0.5)
    if method == "layer-if":  # same gradients, same number of parameters
        assert by_block(alike, found) == pytest.approx([0.5, 0.5])
    else:
        assert by_block(alike, found) == pytest.approx([0.5, 0.5], abs=1e-9)


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
def test_zeros_that_are_there_are_made_up_for_by_the_others(data, count):
    sizes = {str(i): data.draw(st.integers(1, 500)) for i in range(count)}
    wanted = {name: data.draw(st.floats(0, 1)) for name in sizes}
    there = {name: data.draw(st.integers(0, size)) for name, size in sizes.items()}
    total, exact = sum(sizes.values()), {name: wanted[name] * size for name, size in sizes.items()}
    target = math.floor(sum(exact.values()))
    zeros = budget(wanted, sizes, target / total, there)
    assert sum(zeros.values()) == max(target, sum(there.values()))
    assert all(there[name] <= zeros[name] <= size for name, size in sizes.items())
    if sum(there.values()) >= target:
        assert zeros == there
        return
    low, high = 0.0, 1.0
    for _ in range(80):  # the one part of their shares that all the others get
        part = (low + high) / 2
        reached = sum(max(there[name], part * exact[name]) for name in sizes)
        low, high = (part, high) if reached < target else (low, part)
    assert all(abs(zeros[name] - max(there[name], high * exact[name])) <= 1 + 1e-6 for name in sizes)


def test_shares_are_clamped_and_the_rest_makes_up_for_it():
    found = linears(families.model("llama"))
    names = sorted({one.block for one in found})
    made = solve(dict(zip(names, (-0.5, 0.9), strict=True)), operator.add, found, 0.5, "")
    assert {made[one.name] for one in found if one.block == names[0]} == {0.0}
    assert {made[one.name] for one in found if one.block == names[1]} == {1.0}


RECIPES = {
    "magnitude": {"scope": "matrix"},
    "magnitude-row": {"method": "magnitude", "scope": "row"},
    "wanda": {},
    "sparsegpt": {},
    "random": {"seed": 0},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_written_has_the_zeros_that_were_planned(method, recipe, workspace):
    options = {"method": recipe, "sparsity": 0.5, "source": "base/tiny"} | RECIPES[recipe]
    reads = recipe in ("wanda", "sparsegpt")
    spread = {"kind": method}
    chosen = params(
        "llama",
        {
            "prune/even": options | {"calibration": TEXT if reads else NONE},
            "prune/spread": options
            | {"allocation": spread, "calibration": TEXT if reads or method in ("owl", "layer-if") else NONE},
        },
    )
    do(chosen)
    planned = record("prune/spread")["notes"]["prune/spread"]["zeros"]
    written = {one.name: int((one.weight == 0).sum()) for one in linears(load("prune/spread"))}
    even = {one.name: int((one.weight == 0).sum()) for one in linears(load("prune/even"))}
    assert written == planned
    assert sum(written.values()) == sum(even.values())
    assert record("prune/spread")["sparsity"] == record("prune/even")["sparsity"] == 0.5
    assert any(abs(written[name] - even[name]) > 10 for name in even)
    assert not list(Path("data/scratch").rglob("*.*"))


@pytest.mark.parametrize("recipe", ["wanda", "sparsegpt", "magnitude-row"])
@pytest.mark.parametrize("had", [0.25, 0.75])
def test_a_source_with_zeros_meets_the_target_or_is_told_of(had, recipe, workspace, caplog):
    """One threshold over all of them leaves matrices, and their rows, with unlike numbers of zeros."""
    first = {"method": "magnitude", "sparsity": had, "scope": "global", "calibration": NONE}
    then = {"method": recipe, "sparsity": 0.5, "calibration": TEXT} | RECIPES[recipe]
    chosen = params(
        "llama",
        {
            "prune/first": first | {"source": "base/tiny"},
            "prune/spread": then
            | {"source": "prune/first", "allocation": {"kind": "layer-if", "low": 0.01, "high": 0.9}},
        },
    )
    do(chosen, [])
    model = load("base/tiny")
    for number, one in enumerate(linears(model)):
        one.weight.mul_(1 + number % 3)
    model.save_pretrained("data/models/base/tiny")
    logging.disable(logging.NOTSET)
    with caplog.at_level(logging.WARNING):
        for name in ("first", "spread"):
            chosen.prune[name].execute(f"prune/{name}", chosen.run)
    there, written = (
        {one.name: int((one.weight == 0).sum()) for one in linears(load(f"prune/{name}"))}
        for name in ("first", "spread")
    )
    assert record("prune/spread")["notes"]["prune/spread"]["zeros"] == written
    assert record("prune/spread")["sparsity"] == max(had, 0.5)
    assert ("are already zero, more than the" in caplog.text) == (had > 0.5)
    assert (written == there) == (had > 0.5)
