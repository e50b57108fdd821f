"""The work of a run, apart from its scheduling: find the stale stages, advance each, note how each ended."""

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from flows import doctor, forecast, graph, mend
from flows.graph import Graph
from flows.lockfile import Entries, SafeLock
from flows.process import CHATTER, Children, log_of
from flows.resources import Need, Pool, need_of, pool_of
from flows.retries import Retries, cause_of, was_killed
from flows.terminal import console
from flows.watch import Watch
from stages.core import disk
from stages.core.errors import Refusal
from stages.core.files import PROVENANCE, RUNS, read_json, write_json
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
        pool: what its stages share of the machine.
        threads: `run.threads`.
        params: the content of params.yaml that the run was planned on.
        stale: the stages that are out of date by themselves.
        todo: these and all that depend on them, upstream first.
        wrong: the stages whose result disagrees with dvc.lock; DVC would not run them by itself.
        listen: called with each line of a stage worth keeping, in the thread that advances it.
        watch: shows the progress.
    """

    graph: Graph
    pool: Pool
    threads: int = 1
    params: Any = None
    stale: set[str] = field(default_factory=set)
    todo: list[str] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)
    children: Children = field(default_factory=Children)
    lock: SafeLock = field(default_factory=SafeLock)
    retries: Retries = field(default_factory=Retries)
    listen: Callable[[str], object] = lambda line: None
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        self._locked = self.lock.entries
        self._ended: dict[str, Outcome] = {}
        self._changed: set[str] = set()
        self._begun: set[str] = set()
        self._planned = time.strftime("%H:%M")
        self.children.say = self._say

    def find_stale(self) -> None:
        """Bring the code identities up to date, then complete `stale` and `todo`.

        Recipes depend on `data/code` and not on source files, so until stage `code` has run DVC cannot tell
        which recipes an edit made stale.

        Raises:
            Refusal: stage `code` failed, or DVC cannot answer.
        """
        if "code" in self.stale & set(self.graph):
            if self.advance("code").state == "failed":
                raise Refusal(f"code: {self._ended['code'].reason}")
            self.stale = graph.consult(graph.Project.stale)
            self._changed.discard("code")  # DVC has looked at what it wrote
        for name, inputs in mend.find_wrong(self.graph, self.lock.keep()).items():
            self.watch.say(
                name,
                f"dvc.lock lists other inputs than its result was computed from ({inputs}); it runs again",
            )
            self.wrong.add(name)
        if self.wrong:
            mend.forget_runs(self.wrong)
        self.stale = self.stale & set(self.graph) | self.wrong
        below = graph.below(self.graph, self.stale)
        self.todo = graph.measured_last([name for name in self.graph if name in below], self.graph)

    def advance(self, name: str) -> Outcome:
        """Bring one stage up to date, after all stages above it.

        Raises:
            InterruptedError: the run was stopped.
        """
        if name not in self.stale and not self._changed & set(self.graph[name].upstream):
            # It would be stale only if a stage above had changed its outputs, and none has.
            return self._end(Outcome(name, "unchanged"))
        self.retries.wait(name, self.children.stopped)
        with self.pool.hold(self._need(name)) as lease:
            if self.children.stopped.is_set():
                raise InterruptedError(name)
            if self.params not in (None, provenance.content(PARAMS)):  # DVC has not deleted anything yet
                return self._end(Outcome(name, "skipped", 0.0, self._edited()))
            started, clock = time.time(), time.monotonic()
            self._begun.add(name)
            self.watch.starts(name)
            code, output = self._repro(name, lease.environment)
            seconds = round(time.monotonic() - clock, 1)
        changed = self.params not in (None, provenance.content(PARAMS))
        if not code and (inputs := mend.find_wrong(self.graph, {name: self.lock.entries.get(name, {})})):
            mend.forget_runs({name})  # params.yaml changed after DVC had read it and before the stage did
            code, output = 1, f"{inputs[name]} changed as it began; run it again."
        if code:
            mend.restore(self.lock.entries.get(name, {}))
            record = self._record(name, started)
            reason = self._edited() if changed and not record.get("error") else _reason(record, code, output)
            outcome = Outcome(name, "failed", seconds, reason)
            if again := self.retries.note(name, cause_of(record, code, output), lease):
                self.watch.say(name, f"failed ({outcome.reason.rstrip('.')}); it {again}", style="yellow")
                self.watch.resumes(name)
                return self._end(outcome, over=False)
        else:
            outcome = Outcome(name, _state(output), seconds)
            if name not in self._locked or self._outs(self.lock.entries, name) != self._outs(
                self._locked, name
            ):
                self._changed.add(name)
        where = f"; see {log_of(name)}" if code else ""
        self.watch.say(name, f"{outcome.state}, {seconds} s{where}", style="red" if code else "green")
        return self._end(outcome)

    def stop(self) -> None:
        """End all stages at work, and bring back the results that DVC had removed for them."""
        self.children.stop()
        for name in list(self._begun):
            mend.restore(self.lock.entries.get(name, {}))

    def _say(self, stage: str, text: str) -> None:
        """Tell the person and Prefect's logs what this run itself has to say about a stage."""
        self.watch.say(stage, text)
        self.listen(f"{stage}: {text}")

    def _edited(self) -> str:
        return f"params.yaml changed since {self._planned}; what was finished is kept, run again."

    def fail(self, name: str, error: Exception) -> Outcome:
        """Note that an error which is no stage's own kept a stage from running."""
        reason = str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
        self.watch.say(name, f"failed ({reason})", style="red")
        return self._end(Outcome(name, "failed", 0.0, reason))

    def _repro(self, name: str, environment: dict[str, str]) -> tuple[int, str]:
        """Run the stage, and once more if dvc.lock was cut off meanwhile: DVC then restores what it made."""

        prefix = self.graph[name].prefix

        def show(line: str) -> None:
            if self.watch.hears(name, line, prefix):
                self.listen(line)

        mended = self.lock.mended
        try:
            code, output = self.children.repro(name, show, name in self.wrong, environment)
            self.lock.keep()
            if not code and mended != self.lock.mended:
                code = self.children.repro(name, show, False, environment)[0]
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
        """Return the outputs that other stages may read."""
        outs = entries.get(name, {}).get("outs", [])
        return [out for out in outs if not out["path"].startswith(f"{PROVENANCE}/")]

    def _need(self, name: str) -> Need:
        """Return what a stage needs of this machine; say so if it is more memory than there is."""
        if self.children.elsewhere:
            return Need(threads=0)
        need = need_of(self.graph[name], self.graph, self.pool, self.threads)
        if need.gib > self.pool.gib:
            there = f"{self.pool.gib:.1f} GiB of memory that this run has"
            self.watch.say(
                name, f"may need {need.gib:.1f} GiB, more than the {there}; it runs alone", style="yellow"
            )
        return replace(need, alone=True) if name in self.retries.alone else need

    def _end(self, outcome: Outcome, over: bool = True) -> Outcome:
        """Keep how a stage ended; it is not over if it will run again."""
        self._begun.discard(outcome.stage)
        self._ended[outcome.stage] = outcome
        if over:
            self.watch.ends(outcome.stage, outcome.seconds if outcome.state == "ran" else None)
        return outcome

    def _record(self, name: str, started: float) -> dict[str, Any]:
        """Return the run record that the stage has just written; an empty one if it wrote none."""
        record = self.graph[name].record
        fresh = record.exists() and record.stat().st_mtime >= started - 1
        return dict(read_json(record)) if fresh else {}


def plan(
    jobs: int | None,
    targets: Iterable[str],
    children: Children | None = None,
    watch: Watch | None = None,
) -> Plan:
    """Check params.yaml, bring the code identities up to date, and find the stale stages.

    Args:
        jobs: stages side by side at most; None: as many as threads, memory and cards allow.
        children: run the stages; None: as child processes.
        watch: shows the progress; None: in plain text.

    Raises:
        Refusal: bad params, unknown targets or a graph that DVC cannot read; no stage but `code` has run.
    """
    content = provenance.content(PARAMS)
    params = load_verified(device=children is None or not children.elsewhere)
    mend.clear_away()
    lock = SafeLock()
    lock.begin()
    stages, stale = graph.consult(lambda project: (graph.select(project.graph(), targets), project.stale()))
    children = children or Children()
    pool = Pool(1, jobs=jobs) if children.elsewhere else pool_of(params.run, jobs)
    run = Plan(stages, pool, params.run.threads, content, stale, children=children, lock=lock)
    run.watch = watch or run.watch
    if not children.elsewhere:
        console.print(f"{pool} to use", markup=False)
        if Path("requirements.lock").exists() and (other := doctor.other_versions()):
            console.print(
                f"{other}; results may differ: pip install -r requirements.lock",
                style="yellow", markup=False, soft_wrap=True,
            )  # fmt: skip
    console.print(f"{len(stages)} stages; looking for what is out of date", markup=False)
    run.find_stale()
    expected = forecast.expected_seconds(run.graph, params)
    run.watch.expect(run.graph, run.todo, pool.width(params.run.threads), expected)
    return run


def _reason(record: dict[str, Any], code: int, output: str) -> str:
    """Return the error in a stage's run record, or else that it was killed, or the last line it printed."""
    error = str(record.get("error") or "")
    if disk.is_full(f"{error}\n{output}"):
        return disk.full()
    if error:
        return error
    if was_killed(code, output):
        return "it was killed: by the kernel, if memory ran out, or by somebody."
    if re.search(r"exited with -\d+$", output, re.M):
        return "a signal ended it while it started; run it again."
    lines = [line for line in output.splitlines() if not CHATTER.fullmatch(line)]
    own = [line for line in lines if "failed to reproduce" not in line]
    return (own or lines or [""])[-1].strip()


_SAID: dict[str, str] = {"restored": "is cached - skipping run", "unchanged": "didn't change, skipping"}


def _state(output: str) -> Literal["ran", "restored", "unchanged"]:
    """Return what DVC did, by its output."""
    if _SAID["restored"] in output:
        return "restored"
    return "unchanged" if _SAID["unchanged"] in output else "ran"


def said(state: str) -> str:
    """Return what DVC says of a stage that ended so."""
    return _SAID.get(state, "Running stage")
