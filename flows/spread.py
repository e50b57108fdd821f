"""Many machines: each stage of a run is a flow run of its own, for a worker of one of Prefect's pools.

The coordinator plans as for one machine. Where that would start `dvc repro`, `Workers` asks Prefect for the
deployment `stage` of a pool and follows it. The worker checks the run's commit out in its own clone. The
commit's dvc.lock names every result so far, so the worker fetches those that the stage needs, computes it
with `dvc repro`, pushes the result to the DVC remote, and leaves the new entry of dvc.lock as an artifact of
its flow run. The coordinator puts the entry into its own dvc.lock, and the next commit carries it on.

A worker that dies leaves its flow run without a heartbeat. An automation of deploy/automations.yaml then
marks it as crashed, and the coordinator asks for the stage again. A stage that failed is not tried again: its
reason is the user's to mend. A coordinator that died is started again: the flow runs of the first, living or
complete, are found by a key of their inputs.
"""

import itertools
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.states import Cancelling, Completed, Failed, Pending, State

from flows import commits, doctor, graph, lockfile, workspace
from flows.commits import Branch
from flows.compare import mendable
from flows.graph import Graph, Stage
from flows.plan import Plan, said
from flows.process import Children
from flows.resources import pool_of
from flows.terminal import console
from stages.core.errors import Refusal
from stages.core.files import text_sha256
from stages.job import provenance
from stages.job.load import PARAMS, load_verified
from stages.job.locked import LOCK
from stages.job.params import Params

ATTEMPTS = 3
"""Worker deaths allowed per stage."""
HERE = ("code", "validate")
"""Stages that the coordinator runs itself: they take a second."""
WITHOUT_MODEL = re.compile(r"(tidy|report)$|dataset@|alias@")
"""Stages that neither read nor write a model, so that they need no `run.device`."""
_POLL = 2.0
"""Seconds between looks at a flow run."""
_PATIENCE = 60.0
"""Seconds to wait for a worker before a warning."""
_OUTAGE = 600.0
"""Seconds that the server may be away."""
_ENTRY_KEY = "lock"
_OPEN, _CLOSE = "```yaml\n", "```\n"


class Workers(Children):
    """The stages of one run, on the machines of Prefect's work pools."""

    elsewhere = True

    def __init__(self, held: tuple[int, ...], branch: Branch) -> None:
        """Take the open files that hold the workspace, and the branch of the run."""
        super().__init__(held)
        self.branch = branch
        self._readying = threading.Lock()
        self._graph: Graph = {}
        self._params: Params | None = None
        self._sent = False

    def repro(
        self,
        stage: str,
        show: Callable[[str], None],
        force: bool = False,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[int, str]:
        """Have a worker run the stage; return its exit code, and its output or the reason of its failure.

        Raises:
            InterruptedError: the run was stopped before or during the stage.
        """
        if stage in HERE:
            return super().repro(stage, show, force, variables)
        with self._readying:
            self._get_ready()
        assert self._params is not None
        pool = work_pool_of(self._graph[stage], self._params)
        commit, deaths = self.branch.publish(), 0
        key = self._key(stage)
        with get_client(sync_client=True) as client:
            for count in itertools.count():
                try:
                    run = run_deployment(
                        f"stage/{pool}",
                        parameters={"name": stage, "commit": commit, "force": force},
                        timeout=0,
                        flow_run_name=stage,
                        tags=[self.branch.name],
                        idempotency_key=f"{key}-{count}",
                    )
                except ObjectNotFound:
                    return 1, f"Prefect has no deployment stage/{pool}; `prefect deploy --all` creates it."
                assert isinstance(run, FlowRun) and run.state is not None
                state, earlier = run.state, run.state.is_final()
                if not earlier:
                    self.say(stage, f"waits for a worker of pool {pool}, flow run {run.id}")
                    state = self._follow(client, run, pool)
                if state.is_completed():
                    lockfile.put_entry(stage, _entry_left_by(client, run))
                    return 0, str(state.message)
                if earlier:  # than this run: it was cut off
                    continue
                if not state.is_crashed():
                    return 1, state.message or f"its flow run is {state.name}."
                deaths += 1
                if deaths == ATTEMPTS:
                    return 1, f"{ATTEMPTS} workers died while they ran it; see their logs."
                self.say(stage, f"its worker died ({state.message}); it starts again elsewhere")
        raise AssertionError

    def gather(self) -> None:
        """Fetch what workers computed; `dvc status` shows what is missing then."""
        try:
            commits.dvc("pull", "--force", stopped=self.stopped)
        except Refusal as refusal:
            console.print(str(refusal), markup=False, soft_wrap=True)

    def _key(self, stage: str) -> str:
        """Return a key of the run and the stage's inputs."""
        entries = lockfile.entry_texts(LOCK.read_text())
        above = [entries.get(name, "") for name in self._graph[stage].upstream]
        return text_sha256("\n".join([self.branch.id, self.branch.source, stage, *above]))

    def _get_ready(self) -> None:
        """Once a run, send what workers need to the DVC remote and read the graph."""
        if not self._sent:
            commits.dvc("push", ok=False, stopped=self.stopped)  # a worker names what is missing here too
            self._graph, self._params, self._sent = graph.read_graph(), load_verified(device=False), True

    def _follow(self, client: SyncPrefectClient, run: FlowRun, pool: str) -> State[Any]:
        """Wait until the flow run of a stage has ended; cancel it if this run is stopped."""
        asked, patient, started = time.monotonic(), True, False
        answered = asked
        state: State[Any] = Pending()
        while True:
            try:
                state = client.read_flow_run(run.id).state or state
                answered = time.monotonic()
            except httpx.HTTPError as error:
                if time.monotonic() - answered > _OUTAGE:
                    raise OSError(f"Prefect's server has not answered for {_OUTAGE:.0f} s: {error}") from None
            if state.is_final():
                return state
            if state.is_running() and not started:
                started = True
                self.say(run.name, "a worker has it")
            if patient and state.is_scheduled() and time.monotonic() - asked > _PATIENCE:
                patient = False
                self.say(
                    run.name,
                    f"no worker is free; `prefect worker start --pool {pool} --limit 1` starts another",
                )
            if self.stopped.wait(_POLL):
                client.set_flow_run_state(run.id, Cancelling(message="the run was stopped"))
                raise InterruptedError(run.name)


def work_pool_of(stage: Stage, params: Params) -> str:
    """Return the work pool for a stage: `exclusive`, `gpu` or `cpu`."""
    if stage.alone:
        return "exclusive"
    on_gpu = params.run.device.startswith("cuda") and not WITHOUT_MODEL.match(stage.name)
    return "gpu" if on_gpu else "cpu"


@flow(name="stage")
def stage(name: str, commit: str, force: bool = False) -> State[Any]:
    """Compute one stage of a run in this worker's clone, the current folder.

    Args:
        name: a stage, such as prune@wanda-50.
        commit: has the params, the code, and in dvc.lock the results above the stage.
        force: whether to run it even if DVC has its result.
    """

    def work() -> State[Any]:
        with workspace.alone() as held:
            return _compute(name, commit, force, held)

    return mendable(work)


def _compute(name: str, commit: str, force: bool, held: tuple[int, ...]) -> State[Any]:
    """Check out, fetch, compute, push; leave the stage's entry of dvc.lock as an artifact."""
    commits.check_out(commit)
    commits.renew()
    if other := doctor.other_versions():
        raise Refusal(
            f"this worker has {other}, so its results could differ from other workers'; run `pip install -r "
            f"requirements.lock` in {Path.cwd()} and start the worker again."
        )
    stages = graph.read_graph()
    if name not in stages:
        raise Refusal(f"commit {commit} has no stage {name!r}; `dvc stage list` shows those it has.")
    upstream = stages[name].upstream
    if upstream:
        commits.dvc("pull", "--force", *upstream)
    content, params = provenance.content(PARAMS), load_verified()
    run = Plan(
        stages, pool_of(params.run), params.run.threads, content, {name}, [name], {name} if force else set(),
        children=Children(held), listen=get_run_logger().info,
    )  # fmt: skip
    run.lock.begin()
    outcome = run.advance(name)
    while run.retries.due(name):
        outcome = run.advance(name)
    if outcome.state in ("failed", "skipped"):
        return Failed(message=outcome.reason)
    commits.dvc("push", name)
    entry = lockfile.entry_texts(LOCK.read_text())[name]
    create_markdown_artifact(f"{_OPEN}{entry}{_CLOSE}", key=_ENTRY_KEY, description=f"dvc.lock's {name}")
    return Completed(name=outcome.state.capitalize(), message=f"{said(outcome.state)}; {outcome.seconds} s")


def _entry_left_by(client: SyncPrefectClient, run: FlowRun) -> str:
    """Return the text of the dvc.lock entry that a worker left.

    Raises:
        OSError: it left none.
    """
    artifacts = client.read_artifacts(
        artifact_filter=ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]), key=ArtifactFilterKey(any_=[_ENTRY_KEY])
        )
    )
    if not artifacts:
        raise OSError(f"flow run {run.id} completed without an entry of dvc.lock; run it again.")
    return str(artifacts[0].data).removeprefix(_OPEN).removesuffix(_CLOSE)
