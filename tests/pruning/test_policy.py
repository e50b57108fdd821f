"""Policies of step-wise pruning: the rules, and programs that answer well, badly or late."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.core.consent import ALLOW
from stages.core.errors import Refusal
from stages.pruning.policy import Answer, Block, Command, Rules, State, Step, ask
from tests import project
from tests.pipeline import TEXT, do, params, record

NAMES = ("model.layers.0", "model.layers.1")


def state(history: tuple[Step, ...] = (), sparsities: tuple[float, float] = (0.0, 0.0)) -> State:
    """Two blocks, of which the second is the less sensitive one."""
    blocks = [
        Block(name=name, weights=10, sparsity=sparsity, wanda=z, gradient=-z / 2)
        for name, sparsity, z in zip(NAMES, sparsities, (1.0, -1.0), strict=True)
    ]
    return State(
        target=0.5, sparsity=0.0, perplexity=9.0, max_rise=0.1, steps_left=3, blocks=tuple(blocks),
        history=history,
    )  # fmt: skip


def program(folder: Path, body: str, **options: float) -> Command:
    """A policy that runs `body` as a Python program which has read the state."""
    (folder / "policy.py").write_text(f"import json, sys, time\nstate = json.load(sys.stdin)\n{body}\n")
    return Command(kind="command", command=(sys.executable, str(folder / "policy.py")), **options)


def test_the_rules_take_least_from_sensitive_blocks_and_give_up():
    rules = Rules(kind="rules", step=0.2, fraction=0.5, cap=0.6, patience=1)
    assert rules.decide(state()).prune == {NAMES[1]: 0.2}
    failed = Step(prune={NAMES[1]: 0.2}, sparsity=0.1, perplexity=None, kept=False)
    assert rules.decide(state((failed,))).prune == {NAMES[1]: 0.1}
    assert "at 2 steps" in rules.decide(state((failed, failed))).stop
    assert rules.decide(state(sparsities=(0.1, 0.55))).prune == {NAMES[1]: pytest.approx(0.05)}
    assert rules.decide(state(sparsities=(0.1, 0.6))).prune == {NAMES[0]: 0.2}
    assert rules.decide(state(sparsities=(0.6, 0.6))).stop == "every block has lost 0.6"


def test_a_program_is_a_policy(workspace, monkeypatch):
    monkeypatch.setenv(ALLOW, "1")
    body = """
shown = min(state["blocks"], key=lambda block: (block["sparsity"], block["wanda"] + block["gradient"]))
assert state["history"] == [] or state["history"][-1]["kept"]
print(json.dumps({"prune": {shown["name"]: 0.25}}))
"""
    recipe = {
        "source": "base/tiny", "method": "stepwise", "sparsity": 0.25, "max_rise": 10.0, "held_out": 1,
        "policy": program(workspace, body).model_dump(mode="json"), "calibration": TEXT,
    }  # fmt: skip
    do(params("llama", {"prune/made": recipe}))
    facts = record("prune/made")
    assert facts["sparsity"] == 0.25
    assert [len(step["prune"]) for step in facts["notes"]["prune/made"]["steps"]] == [1, 1]


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
def test_a_bad_answer_of_a_program_is_refused_in_a_sentence(body, sentence, tmp_path):
    with pytest.raises(Refusal, match=sentence) as refusal:
        ask(program(tmp_path, body, timeout=2.0), state())
    assert "\n" not in str(refusal.value)


def test_child_processes_of_a_late_program_are_killed(tmp_path):
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
    written = beats.read_text()
    time.sleep(0.3)
    assert written and beats.read_text() == written


def test_a_missing_program_is_refused():
    with pytest.raises(Refusal, match=r"policy command no-such-program cannot be run: No such file"):
        ask(Command(kind="command", command=("no-such-program",)), state())


def test_a_command_runs_without_a_shell():
    command = ("/bin/echo", '{"stop": "$(touch x); `touch y` > z"}')
    assert ask(Command(kind="command", command=command), state()).stop == "$(touch x); `touch y` > z"


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (
            Answer(prune={"model.layers.9": 0.1, "x": 0.1}),
            "names unknown blocks: model.layers.9, x; allowed: model.layers.0 to model.layers.1",
        ),
        (
            Answer(prune={NAMES[0]: 0.6, NAMES[1]: 0.3}),
            "takes more than is left: 0.6 of model.layers.0, which has lost 0.5; answer with at most 1 minus "
            "that",
        ),
    ],
)
def test_answers_that_do_not_fit_the_model_are_refused(answer, sentence):
    policy = SimpleNamespace(kind="scripted", decide=lambda _: answer)
    with pytest.raises(Refusal, match=sentence):
        ask(policy, state(sparsities=(0.5, 0.0)))


@pytest.mark.drill
def test_a_language_model_is_a_policy(workspace, monkeypatch):
    """The example asks the tiny source itself, block by block, until the target is reached."""
    monkeypatch.setenv(ALLOW, "1")
    asking = str(project.ROOT / "sweeps" / "ask_model.py")
    recipe = {
        "source": "base/tiny", "method": "stepwise", "sparsity": 0.2, "max_rise": 10.0, "held_out": 1,
        "policy": {"kind": "command", "command": [sys.executable, asking, "data/models/base/tiny"],
                   "timeout": 600.0},
        "calibration": TEXT,
    }  # fmt: skip
    do(params("llama", {"prune/made": recipe}))
    facts = record("prune/made")
    assert facts["sparsity"] == pytest.approx(0.2, abs=1e-4)
    steps = facts["notes"]["prune/made"]["steps"]
    assert [len(step["prune"]) for step in steps] == [1] * 4  # of two blocks the half it prefers
    assert all(share == pytest.approx(0.1, abs=1e-3) for step in steps for share in step["prune"].values())
