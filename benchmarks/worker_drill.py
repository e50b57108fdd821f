"""Kill workers of spread runs, and what they started, at random moments; check that nothing was lost.

    python -m benchmarks.worker_drill --kills 20 --folder ~/workers    # about two minutes a kill

Prefect runs on PostgreSQL, an S3 server holds results, and two workers have clones of their own, all on
127.0.0.1. A round edits the params, starts `prunequant run --spread`, and at a random moment sends a signal
to a victim: a whole worker with all it started, as if its machine went down; the worker alone; its flow run,
guard, dvc or stage; or the coordinator. Workers that died are started again, and so is the coordinator until
it ends well, three times at most. Then

- every file, and every entry of dvc.lock, equals those of `dvc repro` on one machine,
- each stale stage was computed once, and once more for each worker's run that was hit,
- no stage, dvc, guard or flow run is left, and no traceback was printed.

Each round is a line of JSON in `rounds.jsonl`; the same command continues it. Exit code 1 if a round broke a
rule. It needs what requirements-runners.lock lists.
"""

import argparse
import json
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import drill, variants
from benchmarks.drill import MARK, SIGNALS
from benchmarks.figures import show
from flows.spread import HERE
from stages.job.locked import whole
from tests import finished, project, runners

VICTIMS = ("machine", "worker", "flow run", "guard", "dvc", "stage", "coordinator")
WORKERS = ("one", "two")
STARTS = 3
"""Times the coordinator may be started in a round."""
PATIENCE = 900.0
"""Seconds that a coordinator has to end."""
GRACE = 30.0
"""Seconds that processes have to end after the coordinator."""


class Fleet:
    """The servers, the workers, and the same project on one machine."""

    def __init__(self, servers: runners.Runners) -> None:
        self.servers = servers
        servers.env[MARK] = str(servers.folder)
        self.coordinator = servers.clone("runs")
        self.workers = {name: servers.worker(name, "cpu") for name in WORKERS}
        self.alone = finished.copy(servers.person, servers.folder / "alone")
        finished.repro(self.alone)
        self.expected = 0.0
        """Seconds that the last spread run took."""

    def warm(self) -> None:
        """Compute everything once, undisturbed."""
        started = time.monotonic()
        flow, log = self._start("first")
        if flow.wait(PATIENCE):
            raise SystemExit(f"the first spread run failed:\n{log.read_text()[-2000:]}")
        self.expected = time.monotonic() - started

    def round(self, number: int, seed: int) -> dict[str, Any]:
        """Edit, start, hit, start again until it ends well; return the line for the results."""
        dice, clock = random.Random(f"{seed}/{number}"), time.monotonic()
        victim, name = dice.choice(VICTIMS), dice.choice(list(SIGNALS))
        name = "KILL" if victim == "machine" else name
        moment = dice.uniform(0.05, 1)
        values = {f"prune.{recipe}.sparsity": round(dice.uniform(0.2, 0.7), 6) for recipe in
                  dice.choice((("wanda-50",), ("magnitude-50",), ("wanda-50", "magnitude-50")))}  # fmt: skip
        for folder in (self.servers.person, self.alone):
            for key, value in values.items():
                finished.edit(folder, key, value)
        project.commit(self.servers.person, f"round {number}")
        project.run(self.servers.person, "git", "push", "-q", "origin", "main")
        stale = finished.repro(self.alone) - set(HERE)
        before = len(self.servers.computed())
        flow, log = self._start(f"{number}-0")
        hit = self._hit(flow, victim, SIGNALS[name], moment * self.expected)
        at = time.monotonic() - clock
        codes: list[int] = []
        violations: list[str] = []
        while True:
            codes.append(self._wait(flow, violations))
            text = log.read_text(errors="replace")
            violations += ["the coordinator printed a traceback"] if "Traceback" in text else []
            if not codes[-1] or len(codes) == STARTS:
                break
            flow, log = self._start(f"{number}-{len(codes)}")
        violations += [f"the coordinator failed {STARTS} times: {text[-300:]}"] if codes[-1] else []
        violations += self._differences()
        times = Counter((module, recipe) for _, module, recipe in self.servers.computed()[before:])
        again = times.total() - len(times)
        if len(times) != len(stale) or again > (hit and victim != "coordinator"):
            violations.append(f"stale were {sorted(stale)}, computed {dict(times)}")
        violations += [f"left: {words}" for words in self._left()]
        self._revive()
        return {
            "number": number, "victim": victim, "signal": name, "hit": hit, "at": round(at, 1),
            "stale": sorted(stale), "again": again, "codes": codes,
            "seconds": round(time.monotonic() - clock), "violations": violations,
        }  # fmt: skip

    def _start(self, name: str) -> tuple[subprocess.Popen[bytes], Path]:
        """Start the coordinator; its output goes to a log of this name."""
        log = self.servers.folder / f"coordinator-{name}.log"
        with log.open("wb") as file:
            flow = subprocess.Popen(
                ["prunequant", "run", "--spread"], cwd=self.servers.person, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env={
                    **self.servers.env, "PYTHONPATH": str(self.servers.person),
                    "PRUNEQUANT_CLONE": str(self.coordinator),
                },
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
        return flow, log

    def _wait(self, flow: subprocess.Popen[bytes], violations: list[str]) -> int:
        """Wait for the coordinator, and start workers that died meanwhile."""
        deadline = time.monotonic() + PATIENCE
        while flow.poll() is None:
            if time.monotonic() > deadline:
                violations.append(f"the coordinator had not ended after {PATIENCE:.0f} s")
                runners.end_tree(flow, signal.SIGKILL)
            time.sleep(0.5)
            if time.monotonic() > deadline - PATIENCE + 20:  # a machine takes time to come back
                self._revive()
        return int(flow.returncode)

    def _revive(self) -> None:
        """Start the workers that died."""
        for name, worker in self.workers.items():
            if worker.poll() is not None:
                self.workers[name] = self.servers.worker(name, "cpu")

    def _hit(self, flow: subprocess.Popen[bytes], victim: str, number: int, moment: float) -> bool:
        """Wait for the moment, and if need be until there is such a victim; return whether there was."""
        started = time.monotonic()
        while flow.poll() is None:
            time.sleep(0.1)
            if time.monotonic() - started < moment:
                continue
            if victim == "coordinator":
                flow.send_signal(number)
                return True
            busy = [name for name in WORKERS if self._of(self.workers[name], "flow run")]
            if victim in ("machine", "worker"):
                if busy and victim == "machine":
                    runners.end_tree(self.workers[busy[0]], number)
                    return True
                if busy:
                    self.workers[busy[0]].send_signal(number)
                    return True
                continue
            for name in WORKERS:
                if processes := self._of(self.workers[name], victim):
                    try:
                        processes[0].send_signal(number)
                    except psutil.NoSuchProcess:
                        continue
                    return True
        return False

    def _of(self, worker: subprocess.Popen[bytes], role: str) -> list[psutil.Process]:
        """Return the processes of a role that a worker started."""
        try:
            below = psutil.Process(worker.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [process for process in below if role_of(drill.words(process)) == role]

    def _differences(self) -> list[str]:
        """Compare the coordinator's clone with the project on one machine."""
        shown = project.run(self.coordinator, "git", "show", "spread:dvc.lock").stdout
        now, wanted = whole(shown) or {}, variants.entries(self.alone)
        lines = [f"dvc.lock differs at {name}" for name in sorted({*now, *wanted})
                 if now.get(name) != wanted.get(name)]  # fmt: skip
        files, expected = variants.contents(self.coordinator), variants.contents(self.alone)
        return lines + [
            f"{name} differs" for name in sorted({*files, *expected}) if files.get(name) != expected.get(name)
        ]

    def _left(self) -> list[str]:
        """Wait until no stage is at work any more; return the command lines of what still is."""
        deadline = time.monotonic() + GRACE
        while True:
            lines = [drill.words(process) for process in drill.living(str(self.servers.folder))]
            left = [" ".join(line) for line in lines if role_of(line)]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.5)


def role_of(command: list[str]) -> str:
    """Return which part of a spread run a command line is; the workers and servers are none."""
    if "prefect.engine" in command or any("prefect.runner._workspace" in word for word in command):
        return "flow run"
    role = drill.role_of(command)
    return role if role in ("guard", "dvc", "stage") else "coordinator" if role == "flow" else ""


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Count kills by victim and signal; a cell is those of rounds that kept every rule, of all."""
    hits = [row for row in rows if row["hit"]]
    shown = Table("victim", *SIGNALS, title=f"{len(hits)} kills, recovered / all")
    for victim in VICTIMS:
        cells = [[not row["violations"] for row in hits if (row["victim"], row["signal"]) == (victim, name)]
                 for name in SIGNALS]  # fmt: skip
        shown.add_row(victim, *(f"{sum(cell)} / {len(cell)}" if cell else "" for cell in cells))
    return shown


def main() -> None:
    """Parse the command line and run rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="in all, those in the folder included")
    parser.add_argument("--folder", type=Path, required=True, help="where rounds.jsonl and logs are kept")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    results = options.folder / "rounds.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    base = Path(tempfile.mkdtemp(prefix="servers-", dir=options.folder.resolve()))
    inputs = base / "inputs"
    project.write_inputs(inputs)
    with runners.running(base, inputs) as servers:
        fleet = Fleet(servers)
        fleet.warm()
        while sum(row["hit"] for row in rows) < options.kills:
            rows.append(fleet.round(len(rows), options.seed))
            with results.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            show(json.dumps(rows[-1]))
    Console().print(table(rows))
    if any(row["violations"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
