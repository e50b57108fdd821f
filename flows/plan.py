"""What a run does, apart from who schedules it: the plan, one stage at a time, and how each ended."""

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Literal

from flows import graph
from flows.graph import Graph, Stage
from flows.process import CHATTER, Children
from flows.terminal import console
from stages.core.files import RUNS, write_json
from stages.job import load


@dataclass(frozen=True)
class Outcome:
    """How a stage ended, after how many seconds, and why if it failed."""

    stage: str
    state: Literal["ran", "restored", "unchanged", "failed", "skipped"]
    seconds: float = 0.0
    reason: str = ""


@dataclass
class Run:
    """One run over the graph.

    Attributes:
        graph: the stages asked for and all they need, upstream first.
        stale: those out of date by themselves.
        todo: those and all that depend on them, upstream first.
        jobs: how many run side by side.
    """

    graph: Graph
    stale: set[str]
    todo: list[str]
    jobs: int
    children: Children = field(default_factory=Children)

    def __post_init__(self) -> None:
        self._slots = threading.Semaphore(self.jobs)
        self._collecting = threading.Lock()
        self._locked = graph.locked_outs()
        self._ended: dict[str, Outcome] = {}
        self._changed: set[str] = set()

    def advance(self, name: str) -> Outcome:
        """Bring one stage up to date, those above it being so already.

        Raises:
            InterruptedError: the run was stopped.
        """
        if name not in self.stale and not self._changed & set(self.graph[name].upstream):
            # Out of date only if something above had come out differently, and nothing has.
            return self._end(Outcome(name, "unchanged"))
        with self._room(self.graph[name]):
            if self.children.stopped.is_set():
                raise InterruptedError(name)
            started, clock = time.time(), time.monotonic()
            _say(name, "starts")
            code, output = self.children.repro(name, lambda line: _say(name, line))
            seconds = round(time.monotonic() - clock, 1)
        if code:
            outcome = Outcome(name, "failed", seconds, self._reason(name, started, output))
        else:
            outcome = Outcome(name, _state(output), seconds)
            if graph.locked_outs().get(name) != self._locked.get(name) or name not in self._locked:
                self._changed.add(name)
        _say(name, f"{outcome.state}, {seconds} s", style="red" if code else "green")
        return self._end(outcome)

    def outcomes(self) -> list[Outcome]:
        """How every stage of the graph ended, in the graph's order; written to data/runs/flow.json too."""
        ended = [
            self._ended.get(name, Outcome(name, "skipped" if name in self.todo else "unchanged"))
            for name in self.graph
        ]
        write_json(RUNS / "flow.json", [asdict(outcome) for outcome in ended])
        return ended

    @contextmanager
    def _room(self, stage: Stage) -> Iterator[None]:
        """A slot for the stage; all of them for one that must be alone."""
        taken = 0
        try:
            if stage.alone:
                with self._collecting:  # two that each held some would wait for each other
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
        """What the stage wrote of its failure, or the last it said."""
        record = self.graph[name].record
        if record.exists() and record.stat().st_mtime >= started - 1:
            error = json.loads(record.read_text())["error"]
            if error:
                return str(error)
        lines = [line for line in output.splitlines() if not CHATTER.fullmatch(line)]
        return ([line for line in lines if "failed to reproduce" not in line] or lines or [""])[-1].strip()


def plan(jobs: int | None, targets: Iterable[str]) -> Run:
    """Check params.yaml, then find out what is out of date.

    Raises:
        Refusal: bad params, unknown targets or a graph DVC cannot read; nothing has been run.
    """
    checked = load.load_verified()
    whole = graph.select(graph.read(), targets)
    console.print(f"{len(whole)} stages; looking for what is out of date", markup=False)
    stale = graph.stale(whole)
    below = graph.below(whole, stale)
    if jobs is None:
        on_cpu = checked.run.resolved_device().type == "cpu"
        jobs = max(1, (os.cpu_count() or 1) // checked.run.threads) if on_cpu else 1
    return Run(whole, stale, [name for name in whole if name in below], jobs)


def _say(stage: str, line: str, style: str | None = None) -> None:
    console.print(f"{stage} | {line}", markup=False, soft_wrap=True, style=style)


def _state(output: str) -> Literal["ran", "restored", "unchanged"]:
    """What DVC did, from what it said."""
    if "is cached - skipping run" in output:
        return "restored"
    return "unchanged" if "didn't change, skipping" in output else "ran"
