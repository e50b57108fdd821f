"""Stages on the workers of Prefect's pools, nights on branches: real servers, workers that are killed."""

import json
import signal
import subprocess
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from uuid import uuid4

import pytest
import yaml
from prefect.client.schemas.objects import Artifact, FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Crashed, Failed, Running, Scheduled

from flows import commits, doctor, spread
from flows.graph import Stage
from flows.lockfile import joined
from flows.spread import work_pool_of
from stages.core.errors import Refusal
from stages.core.run import Run
from stages.job.load import checked_params
from stages.job.params import Params
from tests import finished as sweep
from tests import project, runners, toy

drill = pytest.mark.drill
STALE = 180
"""Seconds after a worker's death within which its stage must have started elsewhere."""


@pytest.mark.parametrize(
    ("name", "device", "pool"),
    [
        ("prune@wanda-50", "cuda:0", "gpu"),
        ("graded@base/tiny-news", "cuda", "gpu"),
        ("graded@base/tiny-news", "cpu", "cpu"),
        ("noise@again", "cuda", "gpu"),
        ("model@tiny", "cuda", "gpu"),
        ("dataset@news", "cuda", "cpu"),
        ("report", "cuda", "cpu"),
        ("profile@base/tiny", "cuda", "exclusive"),
    ],
)
def test_the_pool_of_a_stage(inputs, name, device, pool):
    """Planned on a machine that lacks the device."""
    values = sweep.params(inputs)
    values["run"]["device"] = device
    stage = Stage(name, f"python -m stages.{name.partition('@')[0]}", (), ())
    assert work_pool_of(stage, checked_params(values, device=False)) == pool


def entry(name):
    return f"  {name}:\n    cmd: make {name}\n    outs:\n    - path: {name}.txt\n      md5: '1'\n"


class Server:
    """Stands for Prefect's API: flow runs of `stage`, each with the states that it goes through."""

    def __init__(self, *runs):
        self.states = {uuid4(): list(states) for states in runs}
        self.asked, self.cancelled = [], []

    def run_deployment(self, name, **options):
        self.asked.append((name, options["idempotency_key"]))
        run = list(self.states)[len(self.asked) - 1]
        return FlowRun(id=run, flow_id=uuid4(), name="b", state=self.states[run][0])

    def __call__(self, **_):
        return nullcontext(self)

    def read_flow_run(self, run):
        states = self.states[run]
        return FlowRun(id=run, flow_id=uuid4(), state=states.pop(0) if len(states) > 1 else states[0])

    def read_artifacts(self, **_):
        return [Artifact(data=f"```yaml\n{entry('b')}```\n")]

    def set_flow_run_state(self, run, state):
        self.cancelled.append((run, state.name))


class Fixed:
    """Stands for the branch of a run."""

    name, id, source = "spread", "0", "abc"

    def publish(self):
        return "abc"


@pytest.fixture
def workers(tmp_path, monkeypatch):
    """A function that gives the workers of a toy project, beside a server with such flow runs."""
    toy.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.lock").write_text(joined({"a": entry("a")}))
    run = Run(device="cpu", dtype="float32", threads=1, seed=0, numerics="fast")
    monkeypatch.setattr(spread, "_POLL", 0.01)
    monkeypatch.setattr(spread.graph, "read_graph", lambda: toy.GRAPH)
    monkeypatch.setattr(spread.commits, "dvc", lambda *arguments, ok=True, stopped=None: None)
    monkeypatch.setattr(spread, "load_verified", lambda **_: Params.model_construct(run=run))

    def with_runs(*runs):
        server = Server(*runs)
        monkeypatch.setattr(spread, "run_deployment", server.run_deployment)
        monkeypatch.setattr(spread, "get_client", server)
        return spread.Workers((), Fixed()), server

    return with_runs


RAN, DIED = Completed(message="Running stage; 1.0 s"), Crashed(message="no heartbeat")


def test_a_stage_whose_worker_died_starts_again(workers):
    pool, server = workers([Scheduled(), Running(), DIED], [Scheduled(), Running(), RAN])
    said = []
    pool.say = lambda stage, text: said.append((stage, text))
    assert pool.repro("b", pytest.fail) == (0, "Running stage; 1.0 s")
    (first, one), (second, two) = server.asked
    assert (first, second) == ("stage/cpu", "stage/cpu") and one != two
    assert ("b", "its worker died (no heartbeat); it starts again elsewhere") in said
    assert Path("dvc.lock").read_text() == joined({"a": entry("a"), "b": entry("b")})


def test_workers_die_three_times_and_no_more(workers):
    pool, server = workers(*[[Scheduled(), DIED]] * 4)
    code, reason = pool.repro("b", str)
    assert (code, reason) == (1, "3 workers died while they ran it; see their logs.")
    assert len(server.asked) == 3


def test_a_failed_stage_is_not_tried_again(workers):
    pool, server = workers([Scheduled(), Failed(message="no such data set")])
    assert pool.repro("b", str) == (1, "no such data set")
    assert len(server.asked) == 1


def test_a_flow_run_of_a_coordinator_that_was_cut_off_is_taken_over(workers):
    complete, _ = workers([RAN])
    assert complete.repro("b", str)[0] == 0
    failed_then_living, server = workers([Failed(message="then")], [Running(), RAN])
    assert failed_then_living.repro("b", str)[0] == 0
    assert len(server.asked) == 2


def test_a_stopped_run_cancels_what_workers_do(workers):
    pool, server = workers([Running()])
    pool.stopped.set()
    with pytest.raises(InterruptedError):
        pool.repro("b", str)
    assert [state for _, state in server.cancelled] == ["Cancelling"]


def test_a_worker_with_other_packages_computes_nothing(monkeypatch):
    monkeypatch.setattr(commits, "check_out", lambda commit: None)
    monkeypatch.setattr(doctor, "other_versions", lambda: "torch 2.0 instead of 2.13.0")
    monkeypatch.setattr(spread, "Plan", None)
    with pytest.raises(Refusal, match=r"torch 2\.0 instead of 2\.13\.0, so its results could differ"):
        spread._compute("b", "a commit", False, ())


def test_a_deployment_that_is_missing_is_named(workers, monkeypatch):
    pool, _ = workers()

    def missing(name, **options):
        raise ObjectNotFound(Exception())

    monkeypatch.setattr(spread, "run_deployment", missing)
    assert pool.repro("b", str) == (
        1, "Prefect has no deployment stage/cpu; `prefect deploy --all` creates it.",
    )  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory, inputs):
    """The servers, a clone for the coordinator, two workers for stages and one for nights.

    The drills of this file go on from each other's state: run them all, in their order.
    """
    runners.skip_without()
    with runners.running(tmp_path_factory.mktemp("shared"), inputs) as servers:
        servers.clone("runs")
        servers.workers = {name: servers.worker(name, "cpu") for name in ("one", "two")}
        servers.worker("nights", "runs")
        yield servers


@pytest.fixture(scope="module")
def alone(shared, tmp_path_factory):
    """The same project on one machine, by `dvc repro`."""
    folder = sweep.copy(shared.person, tmp_path_factory.mktemp("alone") / "project")
    assert sweep.repro(folder) == runners.STAGES
    return folder


def lock_of(folder, revision):
    shown = project.run(folder, "git", "show", f"{revision}:dvc.lock").stdout
    return yaml.safe_load(shown)["stages"]


def lock(folder):
    return yaml.safe_load((folder / "dvc.lock").read_text())["stages"]


def push(shared, message):
    project.commit(shared.person, message)
    project.run(shared.person, "git", "push", "-q", "origin", "main")


@drill
def test_two_workers_compute_each_stage_once_with_the_bytes_of_one_machine(shared, alone):
    coordinator = shared.folder / "runs"
    output = shared.run("prunequant", "run", "--spread", PRUNEQUANT_CLONE=str(coordinator))
    assert lock_of(coordinator, "spread") == lock(alone), output
    times = Counter((module, recipe) for _, module, recipe in shared.computed())
    assert len(times) == len(runners.STAGES) - 2 and set(times.values()) == {1}, times
    assert {clone.rsplit("/", 1)[1] for clone, *_ in shared.computed()} == {"one", "two"}
    assert str(coordinator / "data/report/index.html") in output
    assert sweep.status(coordinator) == set()
    branches = project.run(shared.folder, "git", "-C", str(shared.origin), "branch", "--list").stdout
    assert branches.split() == ["*", "main"], "the branch that workers followed is gone"


@drill
def test_an_unchanged_night_is_a_commit_and_computes_nothing(shared):
    """The person takes the spread run's lock over; the night's clone finds all results in S3."""
    project.run(shared.person, "git", "fetch", "-q", str(shared.folder / "runs"), "spread:spread")
    project.run(shared.person, "git", "checkout", "-q", "spread", "--", "dvc.lock")
    push(shared, "the results of the workers")
    before = len(shared.computed())
    night(shared)
    ended, *_ = json.loads(shared.run("prunequant", "runs", "origin/night", "--json"))
    assert (ended["revision"], ended["state"]) == ("origin/night", "Completed")
    assert "Everything is cached" in ended["summary"]
    assert len(shared.computed()) == before
    assert lock_of(shared.person, "origin/night") == lock(shared.person)


@drill
def test_the_stage_of_a_killed_worker_runs_again_elsewhere(shared, alone):
    sweep.edit(shared.person, "quantize.gptq-w4g32.bits", 3)
    push(shared, "three bits")
    before = len(shared.computed())
    (shared.hook / "hold").write_text("stages.quantize")
    coordinator = shared.folder / "runs"
    flow = subprocess.Popen(
        ["prunequant", "run", "--spread"],
        cwd=shared.person, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**shared.env, "PYTHONPATH": str(shared.person), "PRUNEQUANT_CLONE": str(coordinator)},
    )  # fmt: skip
    wait_until(lambda: not (shared.hook / "hold").exists(), 240, flow)
    quantized = [clone for clone, module, _ in shared.computed()[before:] if module == "stages.quantize"]
    runners.end_tree(shared.workers[quantized[0].rsplit("/", 1)[1]], signal.SIGKILL)
    count = len(shared.computed())
    wait_until(lambda: len(shared.computed()) > count, STALE, flow)
    output, _ = flow.communicate(timeout=900)
    assert flow.returncode == 0, output
    assert "its worker died (no heartbeat for 75 seconds); it starts again elsewhere" in output
    sweep.edit(alone, "quantize.gptq-w4g32.bits", 3)
    ran = sweep.repro(alone)
    assert lock_of(coordinator, "spread") == lock(alone)
    times = Counter(module for _, module, _ in shared.computed()[before:])
    assert times.pop("stages.quantize") == 2, "once cut off, once whole"
    assert sum(times.values()) == len(ran - {"code", "validate", "quantize@gptq-w4g32"})


@drill
def test_nights_are_compared_and_a_failed_one_is_a_commit(shared):
    night(shared)
    gaps = json.loads(shared.run("prunequant", "diff", "origin/night~1", "origin/night", "--json"))["missing"]
    for gap in gaps:
        shared.run("sh", "-c", gap["command"])
    changes = json.loads(shared.run("prunequant", "diff", "origin/night~1", "origin/night", "--json"))
    assert changes["missing"] == []
    assert [change["key"] for change in changes["params"]] == ["quantize.gptq-w4g32.bits"]
    assert "data/models/quantize/gptq-w4g32" in [change["path"] for change in changes["artifacts"]]
    page = (shared.folder / "nights/data/runs/since-night.html").read_text()
    assert "quantize.gptq-w4g32.bits" in page and 'id="since"' in page and 'id="board"' in page
    sweep.edit(shared.person, "prune.wanda-50.sparsity", 1.5)
    push(shared, "a mistake")
    night(shared)
    runs = json.loads(shared.run("prunequant", "runs", "night", "--json"))
    assert [run["state"] for run in runs] == ["Failed", "Completed", "Completed"]
    assert "1 problem(s), nothing was run" in runs[0]["summary"]
    assert project.run(shared.folder / "nights", "git", "branch", "--show-current").stdout.strip() == ""


@drill
def test_nights_and_workers_run_the_code_of_their_commit(shared):
    """A method that only the new commit has, in a recipe of it."""
    source = (shared.person / "stages/pruning/magnitude.py").read_text()
    added = source.replace("class Magnitude", "class Least").replace('"magnitude"', '"least"')
    added = added.replace("def global_zeros", "def least_zeros").replace("global_zeros(", "least_zeros(")
    (shared.person / "stages/pruning/least.py").write_text(added)
    schema = shared.person / "stages/job/params.py"
    text = schema.read_text().replace("Magnitude | Wanda", "Magnitude | Least | Wanda", 1)
    line = "from stages.pruning.magnitude"
    schema.write_text(text.replace(line, f"from stages.pruning.least import Least\n{line}", 1))
    sweep.edit(shared.person, "prune.wanda-50.sparsity", 0.5)
    sweep.edit(shared.person, "prune.magnitude-50.method", "least")
    push(shared, "a method")
    before = len(shared.computed())
    shared.run("prunequant", "run", "--spread", PRUNEQUANT_CLONE=str(shared.folder / "runs"))
    assert ["stages.prune", "prune@magnitude-50"] in [words for _, *words in shared.computed()[before:]]
    night(shared)
    last, *_ = json.loads(shared.run("prunequant", "runs", "origin/night", "--json"))
    assert last["state"] == "Completed", last
    assert "method: least" in project.run(shared.person, "git", "show", "origin/night:params.yaml").stdout


def night(shared):
    """Run the deployment now, pushed; fetch its branch."""
    shared.run(
        "prefect", "deployment", "run", "scheduled/night", "--param", "push=true", "--watch", code=None
    )
    project.run(shared.person, "git", "fetch", "-q", "origin")


def wait_until(true, seconds, flow):
    deadline = time.monotonic() + seconds
    while not true():
        assert flow.poll() is None, flow.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
