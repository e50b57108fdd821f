"""The flow over a tiny project: what it runs, says, skips and leaves behind."""

import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from flows import doctor, graph
from flows.graph import Stage
from flows.lockfile import SafeLock
from flows.plan import Plan, plan
from flows.resources import Pool
from stages.core.errors import Refusal
from tests import finished as sweep
from tests import project


def stages(**upstream: str) -> graph.Graph:
    """A graph of do-nothing stages from `name="its upstream"`."""
    return {name: Stage(name, "true", tuple(up.split()), (f"data/{name}",)) for name, up in upstream.items()}


@pytest.mark.drill
def test_the_first_run_makes_what_dvc_repro_makes(finished, inputs, tmp_path):
    folder = sweep.make(tmp_path / "project", inputs)
    output = sweep.prunequant(folder, "run")
    assert sweep.outcomes(folder) == dict.fromkeys(sweep.STAGES, "ran")
    assert f"{len(sweep.STAGES)} stages: {len(sweep.STAGES)} ran" in output
    assert str(folder / "data/report/index.html") in output
    assert all(candidate in output.split("Results")[1] for candidate in sweep.CANDIDATES)
    assert "prune@wanda-50 | ran" in output and "%|" not in output
    assert "block" in (folder / "data/runs/logs/prune@wanda-50.log").read_text()
    assert sweep.status(folder) == set()
    locks = [yaml.safe_load((where / "dvc.lock").read_text())["stages"] for where in (folder, finished)]
    assert locks[0] == locks[1] and list(locks[0]) == sorted(locks[1])


@pytest.mark.drill
def test_the_second_run_executes_nothing(copy):
    lock, records = (copy / "dvc.lock").read_bytes(), sorted((copy / "data/runs").rglob("*.json"))
    times = [record.stat().st_mtime for record in records if record.name != "flow.json"]
    output = sweep.prunequant(copy, "run")
    assert f"Everything is cached: {len(sweep.STAGES)} stages are up to date, nothing was run." in output
    assert sweep.outcomes(copy) == dict.fromkeys(sweep.STAGES, "unchanged")
    assert (copy / "dvc.lock").read_bytes() == lock
    assert [record.stat().st_mtime for record in records if record.name != "flow.json"] == times


@pytest.mark.drill
@pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")  # raised while DVC plans
def test_a_lost_lock_is_restored_without_running(copy, monkeypatch, capsys):
    (copy / "dvc.lock").unlink()
    monkeypatch.chdir(copy)
    monkeypatch.setattr(doctor, "other_versions", lambda: "torch 2.0 instead of 2.13.0")
    run = plan(1, ["prune/wanda-50", "noise"])
    assert "torch 2.0 instead of 2.13.0; results may differ" in capsys.readouterr().out
    assert ["code", *run.todo] == list(run.graph)
    assert {run.advance(name).state for name in run.todo} == {"restored"}
    assert {(outcome.stage, outcome.state) for outcome in run.outcomes()} == {
        (name, "restored")
        for name in ("code", "validate", "model@tiny", "dataset@news", "prune@wanda-50", "noise@tiny-batch-3")
    }  # fmt: skip
    with graph.opened() as project:
        assert project.stale() & set(run.graph) == set()


@pytest.mark.drill
def test_a_failed_branch_leaves_the_others_to_finish(copy):
    sweep.edit(copy, "quantize.gptq-w4g32.ignore", ["no.such"])  # only the stage knows the model's names
    sweep.edit(copy, "prune.magnitude-50.sparsity", 0.25)
    output = sweep.prunequant(copy, "run", code=1)
    ended = sweep.outcomes(copy)
    assert {name: state for name, state in ended.items() if state != "unchanged"} == {
        "validate": "ran",
        "prune@magnitude-50": "ran",
        "quantize@gptq-w4g32": "failed",
        "perplexity@quantize/gptq-w4g32-news": "skipped",
        "graded@quantize/gptq-w4g32-arithmetic": "skipped",
        "tidy": "skipped",
        "report": "skipped",
    }
    last = output.strip().splitlines()[-2:]
    assert last[0] == "1 stage(s) failed:"
    assert last[1].startswith("  - quantize@gptq-w4g32: ") and "no.such" in last[1]


@pytest.mark.drill
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_no_process_and_no_half_output(copy, number):
    weights = copy / "data/models/prune/magnitude-50/model.safetensors"
    made = weights.read_bytes()
    sweep.edit(copy, "prune.magnitude-50.sparsity", 0.125)
    mark = f"SWEEP_MARK={copy}"
    env = {**sweep.environment(copy), "SWEEP_MARK": str(copy)}
    flow = subprocess.Popen(
        ["prunequant", "run", "prune/magnitude-50"],
        cwd=copy, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # A shell's background job, which this test may be part of, is born deaf to ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert flow.stdout is not None
    for line in flow.stdout:
        if line.startswith("prune@magnitude-50 | starts"):
            break
    assert any("stages.prune" in command for command in wait_for(mark, "stages.prune"))
    assert any("uvicorn" in command for command in sweep.processes(mark))
    flow.send_signal(number)
    rest = flow.stdout.read()
    assert flow.wait(60) == 128 + number, rest
    flow.stdout.close()
    assert "Traceback" not in rest
    assert sweep.processes(mark) == []
    assert weights.read_bytes() == made, "DVC had removed it, and the flow brings it back"
    assert sweep.repro(copy, "prune@magnitude-50") == {"prune@magnitude-50"}
    assert sweep.status(copy) == {"report"}  # which was no target


def wait_for(mark: str, word: str, seconds: float = 20) -> list[str]:
    """The marked processes, as soon as one of them names `word`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        commands = sweep.processes(mark)
        if any(word in command for command in commands):
            return commands
        time.sleep(0.02)
    return []


def test_two_stages_run_side_by_side_and_no_more(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = stages(a="", b="", c="", d="")
    run = Plan(whole, Pool(4, jobs=2), stale=set(whole), todo=list(whole))
    busy, most = [], []

    def repro(name, show, force, variables):
        busy.append(name)
        most.append(len(busy))
        time.sleep(0.2)
        busy.remove(name)
        return 0, "Running stage"

    monkeypatch.setattr(run.children, "repro", repro)
    with ThreadPoolExecutor(4) as pool:
        assert {outcome.state for outcome in pool.map(run.advance, whole)} == {"ran"}
    assert max(most) == 2


def test_a_stage_that_a_signal_ended_says_so(tmp_path, monkeypatch):
    """DVC's last word of its own is the command, which is no reason."""
    monkeypatch.chdir(tmp_path)
    run = Plan(stages(a=""), Pool(1), stale={"a"}, todo=["a"])
    lines = (
        "> python -m stages.prune a\nERROR: failed to reproduce 'a': failed to run: python, exited with -15"
    )
    monkeypatch.setattr(run.children, "repro", lambda *_, **__: (255, lines))
    assert run.advance("a").reason == "a signal ended it while it started; run it again."


def test_stopping_starts_nothing_more():
    run = Plan(stages(a=""), Pool(1), stale={"a"}, todo=["a"])
    run.children.stop()
    with pytest.raises(InterruptedError):
        run.advance("a")


def test_graph_below_and_select():
    whole = stages(a="", b="a", c="b", d="a", e="")
    assert graph.below(whole, {"b"}) == {"b", "c"}
    assert list(graph.select(whole, ["c"])) == ["a", "b", "c"]
    assert list(graph.select(whole, [])) == list(whole)
    with pytest.raises(Refusal, match=r"'x'.*'bb', did you mean 'b'"):
        graph.select(whole, ["x", "bb"])


@pytest.mark.drill
def test_the_lock_is_sorted_and_means_the_same(copy, monkeypatch):
    before = yaml.safe_load((copy / "dvc.lock").read_text())
    shuffled = {**before, "stages": dict(reversed(before["stages"].items()))}
    (copy / "dvc.lock").write_text(yaml.safe_dump(shuffled, sort_keys=False))
    monkeypatch.chdir(copy)
    SafeLock().sort()
    after = yaml.safe_load((copy / "dvc.lock").read_text())
    assert after == before
    assert list(after["stages"]) == sorted(after["stages"])
    assert sweep.status(copy) == set()


def test_a_name_never_reaches_a_shell(tmp_path, inputs):
    folder = sweep.make(tmp_path / "project", inputs)
    values = project.read(folder)
    values["prune"]["x; touch pwned"] = values["prune"]["magnitude-50"]
    project.write(folder, values)
    done = project.run(folder, "dvc", "repro", ok=False)
    assert done.returncode != 0
    assert "x; touch pwned" in done.stdout + done.stderr
    # Not even where DVC is told to skip what would refuse the name.
    project.run(folder, "dvc", "repro", "--single-item", "--force", "prune@x; touch pwned", ok=False)
    assert not (folder / "pwned").exists()
    assert not (folder / "data/models").exists()
