"""Step-wise pruning: the target met or the miss told, steps undone to the bit, policies checked."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.core.errors import Refusal
from stages.model.blocks import linears
from stages.pruning.policy import Answer, Block, Command, Rules, State, Step, ask
from stages.pruning.stepwise import Stepwise, Work, zscores
from tests import families
from tests.pipeline import NONE, TEXT, do, load, params, record

RULES = {"kind": "rules", "step": 0.2, "fraction": 0.5}
NAMES = ("model.layers.0", "model.layers.1")


def stepwise(**options) -> Stepwise:
    settings = {
        "source": "base/tiny", "method": "stepwise", "sparsity": 0.5, "max_rise": 10.0, "held_out": 1,
        "policy": RULES, "calibration": TEXT,
    } | options  # fmt: skip
    return Stepwise(**settings)


def windows() -> torch.Tensor:
    return torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))


def state(history: tuple[Step, ...] = (), sparsities: tuple[float, float] = (0.0, 0.0)) -> State:
    blocks = [
        Block(name=name, weights=10, sparsity=sparsity, wanda=z, gradient=-z / 2)
        for name, sparsity, z in zip(NAMES, sparsities, (1.0, -1.0), strict=True)
    ]
    return State(
        target=0.5,
        sparsity=0.0,
        perplexity=9.0,
        max_rise=0.1,
        steps_left=3,
        blocks=tuple(blocks),
        history=history,
    )


class Scripted:
    """A policy that says what it was told to, and keeps what it was shown."""

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
    return sum(int((one.weight == 0).sum()) for one in linears(model))


@pytest.mark.parametrize("family", families.CONFIGS)
@pytest.mark.parametrize("sparsity", [0.37, 0.5])
def test_the_target_is_met_to_the_weight(family, sparsity):
    model = families.model(family)
    told = stepwise(sparsity=sparsity).prune(model, windows())
    size = sum(one.weight.numel() for one in linears(model))
    assert zeros(model) == int(size * sparsity + 1e-6)
    assert told["stopped"] == "the target is reached"
    assert told["reached"] == zeros(model) / size
    assert all(step["kept"] for step in told["steps"])
    lost = sum(sum(step["prune"].values()) for step in told["steps"]) / 2  # two blocks of one size
    assert lost == pytest.approx(zeros(model) / size)
    json.dumps(told, allow_nan=False)


def test_survivors_are_the_sources_and_masks_are_wandas():
    base, model = families.model("llama"), families.model("llama")
    recipe, policy = scripted(stepwise(sparsity=0.25), Answer(prune=dict.fromkeys(NAMES, 0.25)))
    recipe.prune(model, windows())
    norms = {}

    def keep(name):
        return lambda _, args: norms.__setitem__(name, args[0].flatten(0, -2).float().square().mean(0).sqrt())

    for one in linears(base):
        one.module.register_forward_pre_hook(keep(one.name))
    with torch.no_grad():
        base(input_ids=windows()[1:])  # the first is held out
    for ours, theirs in zip(linears(model), linears(base), strict=True):
        gone = ours.weight == 0
        assert torch.equal(ours.weight[~gone], theirs.weight[~gone])
        scores = theirs.weight.float().abs() * norms[theirs.name]
        count = ours.weight.shape[1] // 4
        for row in range(len(scores)):
            assert set(gone[row].nonzero().flatten().tolist()) == set(scores[row].argsort()[:count].tolist())
    assert len(policy.shown) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_is_undone_to_the_bit(family):
    model = families.model(family)
    names = tuple(dict.fromkeys(one.block for one in linears(model)))
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


def test_what_rises_too_much_is_undone_and_told(monkeypatch):
    model = families.model("llama")
    base = families.model("llama")
    fares = iter([100.0, 111.0, 109.0, None, 115.0])
    monkeypatch.setattr(Work, "perplexity", lambda self: next(fares))
    recipe, policy = scripted(
        stepwise(sparsity=0.4, max_rise=0.1),
        Answer(prune={NAMES[0]: 0.2}), Answer(prune={NAMES[0]: 0.1}), Answer(prune={NAMES[1]: 0.2}),
        Answer(prune={NAMES[1]: 0.1}), Answer(stop="enough"),
    )  # fmt: skip
    told = recipe.prune(model, windows())
    assert [step["kept"] for step in told["steps"]] == [False, True, False, True]
    assert [step["perplexity"] for step in told["steps"]] == [111.0, 109.0, None, 115.0]
    assert told["stopped"] == "enough"
    assert told["reached"] == pytest.approx(0.1, abs=1e-3) and told["target"] == 0.4
    assert [len(shown.history) for shown in policy.shown] == [0, 1, 2, 3, 4]
    assert policy.shown[-1].blocks[0].sparsity == pytest.approx(0.1, abs=1e-3)
    assert policy.shown[1].blocks == policy.shown[0].blocks
    once, _ = scripted(stepwise(sparsity=0.4), Answer(prune={NAMES[0]: 0.1}), Answer(stop="x"))
    monkeypatch.setattr(Work, "perplexity", lambda self: 1.0)
    once.prune(base, windows())
    first = [one.weight for one in linears(base) if one.block == NAMES[0]]
    assert all(torch.equal(a.weight, b) for a, b in zip(linears(model), first, strict=False))


def test_a_step_that_would_go_too_far_is_cut():
    model = families.model("llama")
    recipe, _ = scripted(
        stepwise(sparsity=0.3), Answer(prune={NAMES[0]: 0.4}), Answer(prune=dict.fromkeys(NAMES, 0.3))
    )
    told = recipe.prune(model, windows())
    size = sum(one.weight.numel() for one in linears(model))
    assert zeros(model) == int(size * 0.3)
    assert told["steps"][1]["prune"] == dict.fromkeys(NAMES, pytest.approx(0.1, abs=1e-3))


def test_a_source_that_is_sparse_already_keeps_its_zeros(workspace):
    first = {
        "source": "base/tiny",
        "method": "magnitude",
        "sparsity": 0.3,
        "scope": "matrix",
        "calibration": NONE,
    }
    more = stepwise(source="prune/first", sparsity=0.45).model_dump(mode="json")
    less = more | {"sparsity": 0.2}
    do(params("llama", {"prune/first": first, "prune/more": more, "prune/less": less}))
    size = sum(one.weight.numel() for one in linears(load("prune/more")))
    assert zeros(load("prune/more")) == int(size * 0.45)
    for before, after in zip(linears(load("prune/first")), linears(load("prune/more")), strict=True):
        assert (after.weight[before.weight == 0] == 0).all()
    told = record("prune/less")["notes"]["prune/less"]
    assert told["steps"] == [] and told["reached"] == pytest.approx(0.3, abs=1e-3)


def test_a_step_of_less_than_a_weight_does_nothing():
    model = families.model("llama")
    recipe, _ = scripted(
        stepwise(), Answer(prune={NAMES[0]: 1.0}), Answer(prune={NAMES[1]: 1e-12}), Answer(stop="x")
    )
    told = recipe.model_copy(update={"sparsity": 0.6}).prune(model, windows())
    assert told["reached"] == 0.5 and told["steps"][1]["prune"] == {NAMES[1]: 0.0}
    assert all(bool((one.weight == 0).all()) == (one.block == NAMES[0]) for one in linears(model))


def test_the_steps_run_out_and_it_is_told():
    model = families.model("llama")
    told = stepwise(max_steps=2).prune(model, windows())
    assert len(told["steps"]) == 2 and told["stopped"] == "max_steps 2 were taken"
    assert 0 < told["reached"] < 0.5


def test_two_runs_are_the_same_bytes(workspace):
    recipe = stepwise().model_dump(mode="json")
    do(params("qwen3", {"prune/one": recipe, "prune/two": recipe}))
    one, two = (Path("data/models/prune") / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    notes = record("prune/one")["notes"]["prune/one"]
    assert notes == record("prune/two")["notes"]["prune/two"]
    assert record("prune/one")["sparsity"] == 0.5 and notes["reached"] == 0.5


def test_the_rules_take_least_from_what_is_sensitive_and_give_up():
    rules = Rules(kind="rules", step=0.2, fraction=0.5, cap=0.6, patience=1)
    assert rules.decide(state()).prune == {NAMES[1]: 0.2}
    failed = Step(prune={NAMES[1]: 0.2}, sparsity=0.1, perplexity=None, kept=False)
    assert rules.decide(state((failed,))).prune == {NAMES[1]: 0.1}
    assert "at 2 steps" in rules.decide(state((failed, failed))).stop
    assert rules.decide(state(sparsities=(0.1, 0.55))).prune == {NAMES[1]: pytest.approx(0.05)}
    assert rules.decide(state(sparsities=(0.1, 0.6))).prune == {NAMES[0]: 0.2}
    assert rules.decide(state(sparsities=(0.6, 0.6))).stop == "every block has lost 0.6"


def program(folder: Path, body: str, **options) -> Command:
    (folder / "policy.py").write_text(f"import json, sys, time\nstate = json.load(sys.stdin)\n{body}\n")
    return Command(kind="command", command=(sys.executable, str(folder / "policy.py")), **options)


def test_a_program_is_a_policy(workspace):
    body = """
shown = min(state["blocks"], key=lambda block: (block["sparsity"], block["wanda"] + block["gradient"]))
assert state["history"] == [] or state["history"][-1]["kept"]
print(json.dumps({"prune": {shown["name"]: 0.25}}))
"""
    policy = program(workspace, body).model_dump(mode="json")
    recipe = stepwise(sparsity=0.25).model_dump(mode="json") | {"policy": policy}
    do(params("llama", {"prune/made": recipe}))
    told = record("prune/made")
    assert told["sparsity"] == 0.25
    assert [len(step["prune"]) for step in told["notes"]["prune/made"]["steps"]] == [1, 1]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("print('I would prune block 3.')", r"wrote 'I would prune block 3\.', which is no answer"),
        ("", "wrote nothing, which is no answer"),
        ("print('{}')", "either prune names blocks or stop gives a reason"),
        ("print('{\"stop\": \"x\", \"prune\": {\"a\": 0.1}}')", "either prune names blocks or stop"),
        ("print('{\"prune\": {\"a\": \"0.1\"}}')", "prune.a: Input should be a valid number"),
        ("print('{\"prune\": {\"a\": NaN}}')", "prune.a: Input should be"),
        ("print('{\"prune\": {\"model.layers.0\": -0.1}}')", "Input should be greater than 0"),
        ("print('{\"prune\": {\"a\": 0.1}, \"why\": \"x\"}')", "why: Extra inputs are not permitted"),
        ("print('[]')", "which is no answer"),
        ("sys.exit('no key')", r"failed with exit code 1 \(no key\); fix the program\.$"),
        ("sys.stderr.close(); sys.exit(3)", r"failed with exit code 3 \(standard error is empty"),
        ("time.sleep(60)", "did not answer within 2 seconds; raise policy.timeout"),
    ],
)  # fmt: skip
def test_a_program_that_answers_rubbish_is_refused_in_a_sentence(body, sentence, tmp_path):
    with pytest.raises(Refusal, match=sentence) as refusal:
        ask(program(tmp_path, body, timeout=2.0), state())
    assert "\n" not in str(refusal.value)


def test_what_a_late_program_started_ends_with_it(tmp_path):
    beats = tmp_path / "beats"
    child = f"""
import time
while True:
    with open({str(beats)!r}, "a") as file:
        file.write("x")
    time.sleep(0.02)
"""
    body = f"""
import subprocess
subprocess.Popen([sys.executable, "-c", {child!r}])
time.sleep(60)
"""
    with pytest.raises(Refusal, match="did not answer within 2 seconds"):
        ask(program(tmp_path, body, timeout=2.0), state())
    heard = beats.read_text()
    time.sleep(0.3)
    assert heard and beats.read_text() == heard


def test_a_program_that_is_not_there_is_refused():
    with pytest.raises(Refusal, match=r"policy command no-such-program cannot be run: No such file"):
        ask(Command(kind="command", command=("no-such-program",)), state())


def test_a_command_sees_no_shell(tmp_path):
    asked = Command(kind="command", command=("/bin/echo", '{"stop": "$(touch x); `touch y` > z"}'))
    assert ask(asked, state()).stop == "$(touch x); `touch y` > z"


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (
            Answer(prune={"model.layers.9": 0.1, "x": 0.1}),
            "names unknown blocks: model.layers.9, x; allowed: model.layers.0 to model.layers.1",
        ),
        (
            Answer(prune={NAMES[0]: 0.6, NAMES[1]: 0.3}),
            "takes more than is left: 0.6 of model.layers.0, which has lost 0.5",
        ),
    ],
)
def test_answers_that_do_not_fit_the_model_are_refused(answer, sentence):
    with pytest.raises(Refusal, match=sentence):
        ask(Scripted(answer), state(sparsities=(0.5, 0.0)))


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


@given(st.lists(st.floats(0, 50), min_size=1, max_size=8))
def test_whole_numbers_add_up(values):
    parts = {str(number): value for number, value in enumerate(values)}
    total = round(sum(values))
    made = whole(parts, total)
    assert sum(made.values()) == total
    assert all(abs(made[name] - part) <= 1 for name, part in parts.items())


def test_zscores():
    assert zscores([1.0, 3.0]) == [-1.0, 1.0]
    assert zscores([2.0, 2.0]) == [0.0, 0.0]
