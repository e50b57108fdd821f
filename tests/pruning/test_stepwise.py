"""Step-wise pruning: the target met or the reason noted, steps undone to the bit."""

import json
from collections import defaultdict
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from pydantic import ValidationError

from stages.core.errors import Refusal
from stages.model.blocks import Linear, linears
from stages.pruning.policy import Answer, State
from stages.pruning.stepwise import Stepwise, Work, wide_sum, zscores
from tests import families
from tests.pipeline import NONE, TEXT, do, load, params, record

pytestmark = [pytest.mark.numerics, pytest.mark.device]
RULES = {"kind": "rules", "step": 0.2, "fraction": 0.5}
NAMES = ("model.layers.0", "model.layers.1")


def stepwise(**options) -> Stepwise:
    settings = {
        "source": "base/tiny", "method": "stepwise", "sparsity": 0.5, "max_rise": 10.0, "held_out": 1,
        "policy": RULES, "calibration": TEXT,
    } | options  # fmt: skip
    return Stepwise(**settings)


def windows() -> torch.Tensor:
    return families.windows(4, 24)


class Scripted:
    """A policy with prepared answers; it keeps the states it was shown."""

    kind = "scripted"

    def __init__(self, *answers: Answer) -> None:
        self.answers, self.shown = list(answers), []

    def decide(self, shown: State) -> Answer:
        self.shown.append(shown)
        return self.answers.pop(0)


def scripted(recipe: Stepwise, *answers: Answer) -> tuple[Stepwise, Scripted]:
    policy = Scripted(*answers)
    return recipe.model_copy(update={"policy": policy}), policy


def zeros(model: torch.nn.Module) -> int:
    return sum(int((linear.weight == 0).sum()) for linear in linears(model))


@pytest.mark.parametrize("family", families.CONFIGS)
@pytest.mark.parametrize("sparsity", [0.37, 0.5])
def test_the_target_is_met_to_the_weight(family, sparsity):
    model = families.model(family)
    notes = stepwise(sparsity=sparsity).prune(model, windows())
    size = sum(linear.weight.numel() for linear in linears(model))
    assert zeros(model) == int(size * sparsity + 1e-6)
    assert notes["stopped"] == "the target is reached"
    assert notes["reached"] == zeros(model) / size
    assert all(step["kept"] for step in notes["steps"])
    lost = sum(sum(step["prune"].values()) for step in notes["steps"]) / 2  # two blocks of one size
    assert lost == pytest.approx(zeros(model) / size)
    json.dumps(notes, allow_nan=False)


def norms(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.double().flatten(0, -2).square().mean(0).sqrt()


def test_survivors_are_the_sources_and_masks_are_wandas():
    base, model = families.model("llama"), families.model("llama")
    recipe, policy = scripted(stepwise(sparsity=0.25), Answer(prune=dict.fromkeys(NAMES, 0.25)))
    measured, plain = defaultdict(list), {}

    def keep(linear: Linear) -> None:
        def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if len(args[0]) == 3 and not torch.is_grad_enabled():  # the first of four windows is held out
                measured[linear.name].append(norms(args[0]))

        linear.module.register_forward_pre_hook(hook)

    for linear in linears(model):
        keep(linear)
    recipe.prune(model, windows())
    for linear in linears(base):
        linear.module.register_forward_pre_hook(
            lambda _, args, name=linear.name: plain.update({name: norms(args[0])})
        )
    with torch.no_grad():
        base(input_ids=windows()[1:])
    for ours, theirs in zip(linears(model), linears(base), strict=True):
        gone = ours.weight == 0
        assert torch.equal(ours.weight[~gone], theirs.weight[~gone])
        assert (gone.sum(1) == gone.shape[1] // 4).all()
        (norm,) = measured[ours.name]
        torch.testing.assert_close(norm, plain[ours.name], rtol=0.02, atol=0)  # activations are bf16
        scores = theirs.weight.double().abs() * norm
        most, least = scores.masked_fill(~gone, 0).amax(1), scores.masked_fill(gone, torch.inf).amin(1)
        assert (most <= least * (1 + 1e-5)).all()
    assert len(policy.shown) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_is_undone_to_the_bit(family):
    model = families.model(family)
    names = tuple(dict.fromkeys(linear.block for linear in linears(model)))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    work = Work(model, stepwise(), windows()[1:], windows()[:1])
    was = work.perplexity()
    work.measure()
    undo, applied = work.take(Answer(prune={names[0]: 0.3}))
    assert applied == {names[0]: pytest.approx(0.3, abs=1e-3)}
    assert zeros(model) > 0 and work.sparsity == pytest.approx(0.15, abs=1e-3)
    work.put_back(undo)
    assert work.sparsity == 0 and work.perplexity() == was
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_step_that_raises_perplexity_too_much_is_undone_and_noted(monkeypatch):
    model = families.model("llama")
    base = families.model("llama")
    perplexities = iter([100.0, 111.0, 109.0, None, 115.0])
    monkeypatch.setattr(Work, "perplexity", lambda self: next(perplexities))
    recipe, policy = scripted(
        stepwise(sparsity=0.4, max_rise=0.1),
        Answer(prune={NAMES[0]: 0.2}), Answer(prune={NAMES[0]: 0.1}), Answer(prune={NAMES[1]: 0.2}),
        Answer(prune={NAMES[1]: 0.1}), Answer(stop="enough"),
    )  # fmt: skip
    notes = recipe.prune(model, windows())
    assert [step["kept"] for step in notes["steps"]] == [False, True, False, True]
    assert [step["perplexity"] for step in notes["steps"]] == [111.0, 109.0, None, 115.0]
    assert notes["stopped"] == "enough"
    assert notes["reached"] == pytest.approx(0.1, abs=1e-3) and notes["target"] == 0.4
    assert [len(shown.history) for shown in policy.shown] == [0, 1, 2, 3, 4]
    assert policy.shown[-1].blocks[0].sparsity == pytest.approx(0.1, abs=1e-3)
    assert policy.shown[1].blocks == policy.shown[0].blocks
    once, _ = scripted(stepwise(sparsity=0.4), Answer(prune={NAMES[0]: 0.1}), Answer(stop="x"))
    monkeypatch.setattr(Work, "perplexity", lambda self: 1.0)
    once.prune(base, windows())
    first = [linear.weight for linear in linears(base) if linear.block == NAMES[0]]
    assert all(torch.equal(a.weight, b) for a, b in zip(linears(model), first, strict=False))


def test_a_step_that_would_go_too_far_is_cut():
    model = families.model("llama")
    recipe, _ = scripted(
        stepwise(sparsity=0.3), Answer(prune={NAMES[0]: 0.4}), Answer(prune=dict.fromkeys(NAMES, 0.3))
    )
    notes = recipe.prune(model, windows())
    size = sum(linear.weight.numel() for linear in linears(model))
    assert zeros(model) == int(size * 0.3)
    assert notes["steps"][1]["prune"] == dict.fromkeys(NAMES, pytest.approx(0.1, abs=1e-3))


def test_a_source_that_is_sparse_already_keeps_its_zeros(workspace):
    first = {
        "source": "base/tiny", "method": "magnitude", "sparsity": 0.3, "scope": "matrix", "calibration": NONE,
    }  # fmt: skip
    more = stepwise(source="prune/first", sparsity=0.45).model_dump(mode="json")
    less = more | {"sparsity": 0.2}
    do(params("llama", {"prune/first": first, "prune/more": more, "prune/less": less}))
    size = sum(linear.weight.numel() for linear in linears(load("prune/more")))
    assert zeros(load("prune/more")) == int(size * 0.45)
    for before, after in zip(linears(load("prune/first")), linears(load("prune/more")), strict=True):
        assert (after.weight[before.weight == 0] == 0).all()
    notes = record("prune/less")["notes"]["prune/less"]
    assert notes["steps"] == [] and notes["reached"] == pytest.approx(0.3, abs=1e-3)


def test_a_step_of_less_than_a_weight_does_nothing():
    model = families.model("llama")
    recipe, _ = scripted(
        stepwise(), Answer(prune={NAMES[0]: 1.0}), Answer(prune={NAMES[1]: 1e-12}), Answer(stop="x")
    )
    notes = recipe.model_copy(update={"sparsity": 0.6}).prune(model, windows())
    assert notes["reached"] == 0.5 and notes["steps"][1]["prune"] == {NAMES[1]: 0.0}
    assert all(bool((linear.weight == 0).all()) == (linear.block == NAMES[0]) for linear in linears(model))


def test_a_recipe_that_runs_out_of_steps_says_so():
    model = families.model("llama")
    notes = stepwise(max_steps=2).prune(model, windows())
    assert len(notes["steps"]) == 2 and notes["stopped"] == "max_steps 2 were taken"
    assert 0 < notes["reached"] < 0.5


def test_two_runs_are_the_same_bytes(workspace):
    recipe = stepwise().model_dump(mode="json")
    do(params("qwen3", {"prune/first": recipe, "prune/second": recipe}))
    folder = Path("data/models/prune")
    first, second = (folder / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    notes = record("prune/first")["notes"]["prune/first"]
    assert notes == record("prune/second")["notes"]["prune/second"]
    assert record("prune/first")["sparsity"] == 0.5 and notes["reached"] == 0.5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"held_out": 4}, "held_out 4 leaves none of 4 calibration windows"),
        ({"sparsity": 0.95}, r"policy.cap 0.9 is below sparsity 0.95"),
        ({"policy": {"kind": "command", "command": ()}}, "at least 1 item"),
        ({"policy": {"kind": "command", "command": "rm -rf x"}}, "valid tuple"),
        ({"policy": {"kind": "command", "command": ("echo", "a\0b")}}, "without a NUL character"),
        ({"policy": {"kind": "agent"}}, "kind"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, sentence):
    with pytest.raises(ValidationError, match=sentence):
        stepwise(**options)


def test_a_broken_source_is_refused():
    model = families.model("llama")
    linears(model)[0].weight.fill_(torch.nan)
    with pytest.raises(Refusal, match="perplexity is not finite"):
        stepwise().prune(model, windows())


def test_a_device_without_fp64_sums_on_the_cpu():
    values = Mock(sum=Mock(side_effect=TypeError("MPS has no float64")), cpu=lambda: torch.ones(3))
    values.device.type = "mps"
    assert wide_sum(values) == 3


def test_zscores():
    assert zscores([1.0, 3.0]) == [-1.0, 1.0]
    assert zscores([2.0, 2.0]) == [0.0, 0.0]
