"""What may pass runs again, after pauses that grow; what cannot pass fails at once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from flows import machine
from flows.graph import Stage
from flows.plan import Plan
from flows.resources import Lease, Need, Pool
from flows.retries import TRIES, Retries, cause_of
from tests import project, toy

KILLED = "ERROR: failed to reproduce 'a': failed to run: python -m stages.prune a, exited with"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A plan of two stages side by side, with short pauses."""
    monkeypatch.chdir(tmp_path)
    whole = {name: Stage(name, f"python -m stages.prune {name}", (), ()) for name in "ab"}
    return Plan(whole, Pool(2), stale=set(whole), todo=list(whole), retries=Retries(pause=0.01))


def advance(run, name):
    """Advance a stage as Prefect's task does; return how it ended, and how often it began."""
    for begun in range(1, 10):
        outcome = run.advance(name)
        if outcome.state != "failed" or not run.retries.due(name):
            return outcome, begun
    raise AssertionError


def fail(run, monkeypatch, passing, times, error="so it is"):
    """Let stages fail so often, with a run record, and then succeed."""
    calls = []

    def repro(name, show, force, variables):
        calls.append(name)
        if calls.count(name) > times:
            return 0, "Running stage"
        record = run.graph[name].record
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"state": "failed", "error": error, "passing": passing}))
        return 255, "exited with 1"

    monkeypatch.setattr(run.children, "repro", repro)


def test_what_may_pass_runs_again_and_says_so(run, monkeypatch, capsys):
    fail(run, monkeypatch, "network", times=2, error="cannot download x: timed out.")
    outcome, begun = advance(run, "a")
    assert (outcome.state, begun) == ("ran", 3)
    lines = [line for line in capsys.readouterr().out.splitlines() if "again" in line]
    begin = "a | failed (cannot download x: timed out); it runs again in 0 s"
    assert lines == [f"{begin} ({tries} of 4), as the network may be back" for tries in (1, 2)]
    assert [outcome.state for outcome in run.outcomes() if outcome.stage == "a"] == ["ran"]


def test_tries_come_to_an_end(run, monkeypatch):
    fail(run, monkeypatch, "network", times=99)
    outcome, begun = advance(run, "a")
    assert (outcome.state, outcome.reason, begun) == ("failed", "so it is", TRIES + 1)


def test_a_refusal_is_not_tried_again(run, monkeypatch):
    fail(run, monkeypatch, None, times=99)
    outcome, begun = advance(run, "a")
    assert (outcome.state, begun) == ("failed", 1)


def test_a_record_of_an_earlier_version_is_no_reason_to_try_again(run, monkeypatch):
    assert cause_of({"state": "failed", "error": "x"}, 255, "") is None
    assert cause_of({"passing": "weather"}, 255, "") is None


@pytest.mark.parametrize(
    ("record", "code", "output", "cause"),
    [
        ({}, 255, f"{KILLED} 137", "memory"),
        ({}, 255, f"{KILLED} -9\n", "memory"),
        ({}, 137, "", "memory"),
        ({}, 255, f"{KILLED} 1", None),
        ({}, 255, f"{KILLED} 1379", None),
        ({"passing": None}, 255, f"{KILLED} 137", None),
    ],
)
def test_a_killed_stage_counts_as_short_of_memory(record, code, output, cause):
    assert cause_of(record, code, output) == cause


def test_what_ran_short_of_memory_runs_again_alone(run, monkeypatch, capsys):
    """`a` is killed beside `b` and then runs alone; killed again, it fails."""
    both, calls, beside = threading.Barrier(2), [], {}

    def repro(name, show, force, variables):
        calls.append(name)
        if calls.count(name) == 1:
            both.wait(10)
        beside[name] = len(run.pool._held)
        return (0, "Running stage") if name == "b" else (255, f"{KILLED} 137")

    monkeypatch.setattr(run.children, "repro", repro)
    other = threading.Thread(target=run.advance, args=("b",))
    other.start()
    outcome, begun = advance(run, "a")
    other.join(10)
    assert (outcome.state, begun) == ("failed", 2)
    assert beside["a"] == 1
    assert outcome.reason == "it was killed: by the kernel, if memory ran out, or by somebody."
    assert "it runs again alone in 0 s (1 of 4), as stages beside it may have" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "after", "again"), [(0, 0, False), (2**30, 0, True), (0, 2**30, True), (2**20, 2**20, False)]
)
def test_a_full_card_is_tried_again_if_others_are_on_it(before, after, again, monkeypatch):
    monkeypatch.setattr(machine, "occupied", lambda card: after)
    lease = Lease(Need(card=True), card="GPU-ab", occupied=before)
    assert bool(Retries().note("a", "card", lease)) == again
    assert not Retries().note("a", "card", Lease(Need()))


def test_pauses_double_and_end_with_the_run():
    retries, stopped = Retries(pause=100), threading.Event()
    pauses = []
    for _ in range(TRIES):
        assert retries.note("a", "network", Lease(Need()))
        pauses.append(retries._pauses["a"])
    assert retries.note("a", "network", Lease(Need())) is None
    assert all(75 * 2**i <= pause <= 125 * 2**i for i, pause in enumerate(pauses))
    threading.Timer(0.05, stopped.set).start()
    before = time.monotonic()
    retries.wait("a", stopped)
    assert time.monotonic() - before < 30 and not retries.due("a")


FLOW = """
import os, sys
os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
from flows.server import configure
configure()
from flows import compare, graph, summary, update
from flows.plan import Plan
from flows.resources import Pool
from flows.retries import Retries
summary.show_report = lambda: None
whole = graph.read_graph()
run = Plan(whole, Pool(4), stale=set(whole), todo=list(whole), retries=Retries(float(sys.argv[1])))
compare.advance_on_a_server(run)
ending = update.conclude(run)
print(ending.message)
sys.exit(not ending.ok)
"""
STAGE = """import json, pathlib, sys
name, times = sys.argv[1], int(sys.argv[2])
count = pathlib.Path(f"{name}.tries")
tries = int(count.read_text()) if count.exists() else 0
count.write_text(str(tries + 1))
if tries < times:
    record = pathlib.Path(f"data/runs/prune/{name}.json")
    record.parent.mkdir(parents=True, exist_ok=True)
    passing = None if name == "stays" else "network"
    record.write_text(json.dumps({"state": "failed", "error": f"{name} failed", "passing": passing}))
    sys.exit(2)
pathlib.Path(name).write_text("x")
"""


@pytest.fixture
def flow(tmp_path):
    """Start a flow of Prefect over stages that fail; `passes` fails twice, `below` needs it."""
    toy.make(tmp_path)
    (tmp_path / "stages/__init__.py").touch()
    (tmp_path / "stages/prune.py").write_text(STAGE)
    lines = ["stages:"]
    for name, times, deps in (("passes", 2, "[]"), ("below", 0, "[passes]"), ("stays", 9, "[]")):
        command = f"python -m stages.prune {name} {times}"
        lines.append(f"  {name}: {{cmd: {command}, deps: {deps}, outs: [{name}]}}")
    (tmp_path / "dvc.yaml").write_text("\n".join([*lines, ""]))
    (tmp_path / "flow.py").write_text(FLOW)
    env = {**project.ENV, **project.importing(project.ROOT), "PREFECT_HOME": str(tmp_path / "prefect")}

    def start(pause):
        code = "import sys; sys.path.remove(''); exec(open('flow.py').read())"
        return subprocess.Popen(
            [sys.executable, "-c", code, str(pause)], cwd=tmp_path, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip

    return start


@pytest.mark.drill
def test_prefect_runs_again_what_may_pass_and_what_waits_for_it_waits(flow, tmp_path):
    with flow(0.1) as process:
        output = process.stdout.read()
    assert process.returncode == 1, output
    tries = {name: int((tmp_path / f"{name}.tries").read_text()) for name in ("passes", "below", "stays")}
    assert tries == {"passes": 3, "below": 1, "stays": 1}, output
    rows = json.loads((tmp_path / "data/runs/flow.json").read_text())
    assert {row["stage"]: row["state"] for row in rows} == {
        "passes": "ran", "below": "ran", "stays": "failed"
    }  # fmt: skip
    assert "stays failed" in output.splitlines()[-1]


@pytest.mark.drill
def test_ctrl_c_ends_a_pause(flow, tmp_path):
    with flow(1000) as process:
        for line in process.stdout:
            if "runs again in" in line:
                break
        else:
            pytest.fail("no stage is to run again")
        before = time.monotonic()
        os.kill(process.pid, signal.SIGINT)
        output = process.stdout.read()
    assert time.monotonic() - before < 60, output
    assert process.returncode not in (0, None) and (tmp_path / "passes.tries").read_text() == "1"
