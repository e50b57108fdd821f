"""How a run ends: nothing that kept a stage from running is lost."""

import subprocess
import sys

import pytest

from flows import update, workspace
from flows.plan import Plan
from flows.resources import Pool
from stages.core.errors import Refusal
from stages.core.files import SCRATCH
from tests import finished as sweep
from tests import toy

UNFORESEEN = """
import os, sys
os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
from flows.server import configure
configure()
from flows import compare, graph, summary, update
from flows.plan import Plan
from flows.resources import Pool
summary.show_report = lambda: None
whole = graph.read_graph()
run = Plan(whole, Pool(2), stale=set(whole), todo=list(whole))
repro, progress = run.children.repro, compare.update_progress_artifact
def unforeseen(stage, *options):
    if stage == sys.argv[1]:
        raise ValueError("nobody foresaw this")
    return repro(stage, *options)
def silent(*artifact):
    raise TimeoutError("the server is slow")
run.children.repro, compare.update_progress_artifact = unforeseen, silent
compare.advance_on_a_server(run)
ending = update.conclude(run)
print(ending.message)
sys.exit(not ending.ok)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    toy.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    return Plan(toy.GRAPH, Pool(2), stale=set(toy.GRAPH), todo=list(toy.GRAPH))


def test_a_stage_without_an_end_is_no_success(run):
    ending = update.conclude(run)
    assert not ending.ok and ending.message.startswith("code, a, b did not run")


@pytest.mark.parametrize(("error", "reason"), [
    (ValueError("out of range"), "ValueError: out of range"), (Refusal("no such branch."), "no such branch."),
])  # fmt: skip
def test_an_unforeseen_error_is_the_reason_of_its_stage(run, error, reason):
    run.fail("a", error)
    ending = update.conclude(run)
    assert not ending.ok and f"a: {reason}" in ending.message


@pytest.mark.drill
@pytest.mark.parametrize(("stage", "words"), [("a", "ValueError: nobody foresaw this"), ("no stage", "ran")])
def test_an_unforeseen_error_fails_the_run_and_a_picture_does_not(tmp_path, stage, words):
    toy.make(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", UNFORESEEN, stage], cwd=tmp_path, capture_output=True, text=True,
        env=sweep.environment(tmp_path) | {"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.returncode == (stage == "a"), done.stdout + done.stderr
    assert words in done.stdout
    assert (tmp_path / "b.txt").exists()


@pytest.mark.parametrize(("targets", "fails", "kept"), [
    ([], False, False), (["a"], False, True), ([], True, True),
])  # fmt: skip
def test_scratch_goes_once_all_is_up_to_date(run, monkeypatch, targets, fails, kept):
    left = [SCRATCH / "finetune/lora/0123/step-000060.json", SCRATCH / "export-x1/model.gguf"]
    for file in left:
        file.parent.mkdir(parents=True)
        file.touch()
    monkeypatch.setattr(update, "plan", lambda *_: run)
    monkeypatch.setattr(workspace, "claim", lambda: None)
    monkeypatch.setattr(workspace, "_when_idle", lambda act: act("", {}))

    def advance(run):
        if fails:
            run.fail("a", ValueError("out of range"))
        else:
            for name in run.todo:
                run.advance(name)

    ending = update.plan_and_advance(run.children, None, targets, advance)
    assert ending.ok is not fails
    assert [file.exists() for file in left] == [kept, True]
