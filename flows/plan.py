"""The work of a run, apart from its scheduling: find the stale stages, advance each, note how each ended."""

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flows import graph, mend
from flows.graph import Graph, Stage
from flows.lockfile import Entries, SafeLock
from flows.process import CHATTER, Children
from flows.terminal import console
from stages.core import disk
from stages.core.errors import Refusal
from stages.core.files import RUNS, read_json, write_json
from stages.job import provenance
from stages.job.load import PARAMS, load_verified


@dataclass(frozen=True)
class Outcome:
    """How a stage ended, its seconds, and the reason if it failed."""

    stage: str
    state: Literal["ran", "restored", "unchanged", "failed", "skipped"]
    seconds: float = 0.0
    reason: str = ""


@dataclass
class Plan:
    """One run over the graph.

    Attributes:
        graph: the requested stages and all they need, upstream first.
        jobs: how many stages run side by side.
        params: the content of params.yaml that the run was planned on.
        stale: the stages that are out of date by themselves.
        todo: these and all that depend on them, upstream first.
        wrong: the stages whose result disagrees with dvc.lock; DVC would not run them by itself.
    """

    graph: Graph
    jobs: int
    params: Any = None
    stale: set[str] = field(default_factory=set)
    todo: list[str] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)
    children: Children = field(default_factory=Children)
    lock: SafeLock = field(default_factory=SafeLock)

    def __post_init__(self) -> None:
        self._slots = threading.Semaphore(self.jobs)
        self._collecting = threading.Lock()
        self._locked = self.lock.entries
        self._ended: dict[str, Outcome] = {}
        self._changed: set[str] = set()
        self._planned = time.strftime("%H:%M")

    def find_stale(self) -> None:
        """Bring the code identities up to date, then ask DVC which stages are stale.

        Recipes depend on `data/code` and not on source files, so until stage `code` has run DVC cannot tell
        which recipes an edit made stale.

        Raises:
            Refusal: stage `code` failed, or DVC cannot answer.
        """
        self.stale = {"code"} & set(self.graph)
        if self.stale and self.advance("code").state == "failed":
            raise Refusal(f"code: {self._ended['code'].reason}")
        for name, inputs in mend.find_wrong(self.graph).items():
            _say(name, f"dvc.lock names other inputs than it was computed from ({inputs}); it runs again")
            self.wrong.add(name)
        if self.wrong:
            mend.forget_runs(self.wrong)
        self.stale = graph.stale(self.graph) | self.wrong
        below = graph.below(self.graph, self.stale)
        self.todo = [name for name in self.graph if name in below]

    def advance(self, name: str) -> Outcome:
        """Bring one stage up to date, after all stages above it.

        Raises:
            InterruptedError: the run was stopped.
        """
        if name not in self.stale and not self._changed & set(self.graph[name].upstream):
            # It would be stale only if a stage above had changed its outputs, and none has.
            return self._end(Outcome(name, "unchanged"))
        with self._room(self.graph[name]):
            if self.children.stopped.is_set():
                raise InterruptedError(name)
            if self.params not in (None, provenance.content(PARAMS)):  # DVC has not deleted anything yet
                reason = f"params.yaml changed since {self._planned}; what was finished is kept, run again."
                return self._end(Outcome(name, "skipped", 0.0, reason))
            started, clock = time.time(), time.monotonic()
            _say(name, "starts")
            code, output = self._repro(name)
            seconds = round(time.monotonic() - clock, 1)
        if code:
            mend.restore(self.graph[name].outs)
            outcome = Outcome(name, "failed", seconds, self._reason(name, started, output))
        else:
            outcome = Outcome(name, _state(output), seconds)
            if name not in self._locked or self._outs(self.lock.entries, name) != self._outs(
                self._locked, name
            ):
                self._changed.add(name)
        _say(name, f"{outcome.state}, {seconds} s", style="red" if code else "green")
        return self._end(outcome)

    def _repro(self, name: str) -> tuple[int, str]:
        """Run the stage, and once more if dvc.lock was cut off meanwhile: DVC then restores what it made."""
        mended = self.lock.mended
        try:
            code, output = self.children.repro(name, lambda line: _say(name, line), name in self.wrong)
            self.lock.keep()
            while not code and mended != self.lock.mended:
                mended = self.lock.mended
                code = self.children.repro(name, lambda line: _say(name, line))[0]
                self.lock.keep()
        except InterruptedError:
            raise
        except OSError as error:  # such as a full disk
            code, output = 1, str(error)
        return code, output

    def outcomes(self) -> list[Outcome]:
        """Return how every stage ended, in the graph's order; also write it to data/runs/flow.json."""
        ended = [
            self._ended.get(name, Outcome(name, "skipped" if name in self.todo else "unchanged"))
            for name in self.graph
        ]
        write_json(RUNS / "flow.json", [asdict(outcome) for outcome in ended])
        return ended

    @staticmethod
    def _outs(entries: Entries, name: str) -> Any:
        return entries.get(name, {}).get("outs")

    @contextmanager
    def _room(self, stage: Stage) -> Iterator[None]:
        """Hold a slot for the stage; all slots for a stage that must run alone."""
        taken = 0
        try:
            if stage.alone and not self.children.elsewhere:
                with self._collecting:  # two stages that each held some slots would wait for each other
                    while taken < self.jobs:
                        self._slots.acquire()
                        taken += 1
            else:
                self._slots.acquire()
                taken = 1
            yield
        finally:
            for _ in range(taken):
                self._slots.release()

    def _end(self, outcome: Outcome) -> Outcome:
        self._ended[outcome.stage] = outcome
        return outcome

    def _reason(self, name: str, started: float, output: str) -> str:
        """Return the error in the stage's run record, or else the last line it printed."""
        record = self.graph[name].record
        fresh = record.exists() and record.stat().st_mtime >= started - 1
        error = str(read_json(record)["error"] or "") if fresh else ""
        if disk.is_full(f"{error}\n{output}"):
            return disk.full()
        if error:
            return error
        lines = [line for line in output.splitlines() if not CHATTER.fullmatch(line)]
        own = [line for line in lines if "failed to reproduce" not in line]
        return (own or lines or [""])[-1].strip()


def plan(jobs: int | None, targets: Iterable[str], children: Children | None = None) -> Plan:
    """Check params.yaml, bring the code identities up to date, and find the stale stages.

    Args:
        jobs: stages side by side; None: as many as the cores allow, 1 on a GPU.
        children: run the stages; None: as child processes.

    Raises:
        Refusal: bad params, unknown targets or a graph that DVC cannot read; no stage but `code` has run.
    """
    content = provenance.content(PARAMS)
    params = load_verified(device=children is None or not children.elsewhere)
    lock = SafeLock()
    lock.begin()
    stages = graph.select(graph.read_graph(), targets)
    if jobs is None:
        on_cpu = params.run.resolved_device().type == "cpu"
        jobs = max(1, (os.cpu_count() or 1) // params.run.threads) if on_cpu else 1
    run = Plan(stages, jobs, content, children=children or Children(), lock=lock)
    console.print(f"{len(stages)} stages; looking for what is out of date", markup=False)
    run.find_stale()
    return run


def _say(stage: str, line: str, style: str | None = None) -> None:
    console.print(f"{stage} | {line}", markup=False, soft_wrap=True, style=style)


def _state(output: str) -> Literal["ran", "restored", "unchanged"]:
    """Return what DVC did, by its output."""
    if "is cached - skipping run" in output:
        return "restored"
    return "unchanged" if "didn't change, skipping" in output else "ran"
