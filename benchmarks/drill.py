"""Kill runs at random moments, again and again, and check after each round that nothing was lost.

    python -m benchmarks.drill --kills 200 --folder ~/drill    # hours; stopped, the same line continues it
    python -m benchmarks.drill --folder ~/drill --round 17     # the same draws again

A round starts from the finished project of one variant (`benchmarks.variants`) and edits it into another.
Then it starts `prunequant run` or `dvc repro`, and at one to three random moments sends SIGKILL, SIGTERM or
SIGINT to a victim: the flow, a guard, dvc, a stage, Prefect's temporary server or its guard, the process
group of the run, or every process of it at once; or it fills the disk. Sometimes params or code are edited
meanwhile.
After one to four such runs an undisturbed `prunequant run` must bring all up to date, with

- every file, and every entry of dvc.lock, equal to those of a project that was never disturbed,
- `prunequant check` and `dvc status` content, and no traceback,
- nothing computed again that DVC had locked before,
- no process, lock, scratch or half-written file left.

Each round is a line of JSON in `rounds.jsonl`. A table by victim and signal comes last. Exit code 1 if a
round broke a rule; its project is in `kept/`, what its runs printed in `logs/`. A full disk needs root.
"""

import argparse
import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import variants
from benchmarks.figures import show
from benchmarks.variants import METHOD, SIZES, VARIANTS, Variants
from flows import guard
from stages.core.files import read_json, write_json
from tests import finished, project

MARK = "PRUNEQUANT_DRILL"
"""A variable that holds the project's folder, in the environment of every process of a round."""
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT}
FLOW = ("prunequant", "run")
BARE = (sys.executable, "-m", "dvc", "repro")
VICTIMS = {
    FLOW: ("stage", "dvc", "guard", "flow", "server", "server's guard", "group", "all", "disk"),
    BARE: ("stage", "dvc", "group", "all", "disk"),
}
"""What is hit in a run of each command."""
PATIENCE = 90.0
"""Seconds, beside twice the expected, that a run has to end after the kill."""
FREE = 64 * 2**20
"""Bytes that a disk has beside the project until it is filled."""
PARTIAL = re.compile(r"\..+\.\d+")
"""The name of a file while it is written."""


@dataclass(frozen=True)
class Hit:
    """A signal to a victim. Moments are shares of the time that the run would take undisturbed."""

    victim: str
    signal: str
    moment: float
    room: int = 0
    """Bytes that a full disk has left."""


@dataclass(frozen=True)
class Step:
    """A run that is disturbed."""

    command: tuple[str, ...]
    hits: tuple[Hit, ...]
    """In the order of their moments; what ends the run spares it the later ones."""
    edit: str = ""
    """The variant that the project is edited into, or `comment` for an edit that changes no result."""
    edited: float = 1.0
    """When; after the run if it has ended by then."""


@dataclass(frozen=True)
class Round:
    """The draws of a round."""

    number: int
    start: str
    goal: str
    cached: bool
    """Whether DVC's run cache holds what other variants computed."""
    steps: tuple[Step, ...]


@dataclass
class Seen:
    """How a disturbed run went."""

    kills: list[dict[str, Any]] = field(default_factory=list)
    """Each hit that found its victim: the victim, the signal, the stages at work, seconds after the start."""
    code: int = 0
    ending: float = 0.0
    """Seconds from the last hit until the run and all its processes had ended."""
    traceback: bool = False


def draw(seed: int, number: int, names: Sequence[str]) -> Round:
    """Draw a round; the same seed and number give the same."""
    dice = random.Random(f"{seed}/{number}")
    start, goal = dice.sample(names, 2)
    steps = []
    for _ in range(dice.randint(1, 4)):
        command = dice.choices((FLOW, BARE), (3, 1))[0]
        moments = sorted(round(dice.random(), 3) for _ in range(dice.randint(1, 3)))
        step = Step(command, tuple(_draw_hit(dice, command, moment) for moment in moments))
        if dice.random() < 0.4:
            step = replace(step, edit=dice.choice([*names, "comment"]), edited=round(dice.uniform(0, 1.3), 3))
        steps.append(step)
    return Round(number, start, goal, dice.random() < 0.15, tuple(steps))


def _draw_hit(dice: random.Random, command: tuple[str, ...], moment: float) -> Hit:
    victim, kind = dice.choice(VICTIMS[command]), dice.choice(list(SIGNALS))
    kind = {"all": "KILL", "disk": "full"}.get(victim, kind)
    return Hit(victim, kind, moment, dice.choice((0, 4096, 30_000, 300_000)) if victim == "disk" else 0)


class Drill:
    """One round in a folder of its own."""

    def __init__(self, drawn: Round, known: Variants, pace: float = 1.0) -> None:
        """Take the draws, and how many times longer than expected the last undisturbed run took."""
        self.drawn, self.known, self.pace = drawn, known, pace
        self.goal = drawn.goal
        self.violations: list[str] = []
        self.at = known.folder / "rounds" / f"{drawn.number:04d}"
        self.logs = known.folder / "logs" / self.at.name
        self.env: dict[str, str] = {}

    def run(self) -> dict[str, Any]:
        """Disturb, recover and check; return the line for the results."""
        clock = time.monotonic()
        start = self.known.reference(self.drawn.start)
        self.known.reference(self.goal)
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        with self._place(start):
            self._set_up(start)
            seen = [self._disturb(index, step) for index, step in enumerate(self.drawn.steps)]
            seconds = self._recover()
            self._inspect()
            if self.violations:
                self._keep()
        steps = [
            {**asdict(step), "command": step.command[-1], **asdict(how)}
            for step, how in zip(self.drawn.steps, seen, strict=True)
        ]
        return {
            **asdict(self.drawn), "steps": steps, "goal": self.goal, "recovery": seconds, "pace": self.pace,
            "seconds": round(time.monotonic() - clock), "violations": self.violations,
        }  # fmt: skip

    @contextlib.contextmanager
    def _place(self, start: Path) -> Iterator[None]:
        """Give the project a folder, with a file system of its own if the round fills it."""
        mount = None
        victims = {hit.victim for step in self.drawn.steps for hit in step.hits}
        if "disk" in victims and not os.geteuid():
            mount = self.known.folder / "disk"
            self.at = mount / self.at.name
            mount.mkdir(exist_ok=True)
            size = 3 * variants.size_of(start) + FREE
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount], check=True)
        try:
            yield
        finally:
            end(str(self.at))
            if mount:
                subprocess.run(["umount", "-l", mount], check=True)
            else:
                shutil.rmtree(self.at, ignore_errors=True)

    def _set_up(self, start: Path) -> None:
        """Copy the project, with flows/ as it is now, and edit it into the goal."""
        shutil.rmtree(self.at, ignore_errors=True)
        finished.copy(start, self.at)
        shutil.rmtree(self.at / "flows")
        shutil.copytree(project.ROOT / "flows", self.at / "flows", ignore=shutil.ignore_patterns("__py*"))
        if not self.drawn.cached:
            shutil.rmtree(self.at / ".dvc/cache/runs")
        self.known.apply(self.goal, self.at)
        self.env = {**finished.environment(self.at), **self.known.env, MARK: str(self.at)}

    def _disturb(self, index: int, step: Step) -> Seen:
        """Start a run, edit and hit at the moments drawn, and wait until it has ended."""
        before, expected = self._finished(), self._expected()
        name = f"{step.command[-1]} after {', '.join(f'{hit.signal} of {hit.victim}' for hit in step.hits)}"
        log = self.logs / f"{index}-{step.command[-1]}.log"
        seen, edit, started = Seen(), step.edit, time.monotonic()
        run = self._start(step.command, log)
        waiting = list(step.hits)
        full_until, at, elapsed = None, 0.0, 0.0
        while run.poll() is None and elapsed < 2 * expected + PATIENCE + at:
            time.sleep(0.1)
            elapsed = time.monotonic() - started
            if edit and elapsed >= step.edited * expected:
                self._edit(edit)
                edit = ""
            if waiting and elapsed >= waiting[0].moment * expected:
                hit = waiting.pop(0)
                running = sorted(set(self._stages()))
                if self._hit(run, hit):
                    at = round(time.monotonic() - started, 2)
                    seen.kills.append(
                        {"victim": hit.victim, "signal": hit.signal, "running": running, "at": at}
                    )
                    full_until = at + expected / 4 if hit.victim == "disk" else full_until
            if full_until and elapsed >= full_until:
                self._make_room()
        self._make_room()
        if run.poll() is None:
            self.violations.append(f"{name} had not ended after {elapsed - at:.0f} s")
            end(str(self.at))
        seen.code = run.wait()
        left = self._left(guard.GRACE + 15 if step.command == FLOW else 1)  # DVC leaves its stage to itself
        if left and step.command == FLOW:
            self.violations.append(f"{name} left {'; '.join(left)}")
        seen.ending = round(time.monotonic() - started - at, 2)
        text = log.read_text(errors="replace")
        seen.traceback = "Traceback" in text
        if "manually remove" in text and step.command == FLOW:
            self.violations.append(f"{name} advised to delete a lock")
        self._compare(before, name)
        if edit:
            self._edit(edit)
        return seen

    def _recover(self) -> float:
        """Run undisturbed; return the seconds it took."""
        before, expected, started = self._finished(), self._expected(), time.monotonic()
        log = self.logs / "recovery.log"
        run = self._start(FLOW, log)
        try:
            run.wait(2 * expected + PATIENCE)
        except subprocess.TimeoutExpired:
            self.violations.append(f"the recovery had not ended after {time.monotonic() - started:.0f} s")
            end(str(self.at))
        text = log.read_text(errors="replace")
        if run.wait():
            self.violations.append(f"the recovery failed: {' '.join(text.strip().splitlines()[-2:])}")
        self.violations += [
            f"the recovery printed {word}" for word in ("Traceback", "rwlock") if word in text
        ]
        self._compare(before, "the recovery")
        if left := self._left(15):
            self.violations.append(f"the recovery left {'; '.join(left)}")
        seconds = time.monotonic() - started
        self.pace = round(min(8.0, max(0.5, self.pace * seconds / expected)), 2)
        return round(seconds, 1)

    def _inspect(self) -> None:
        """Compare the project with the undisturbed project of its variant."""
        reference = self.known.reference(self.goal)
        now, wanted = variants.entries(self.at), variants.entries(reference)
        gone = variants.gone(reference, wanted)
        for name in sorted({*now, *wanted} - {*gone}):
            if name not in now or name not in wanted or not variants.same(name, now[name], wanted[name]):
                self.violations.append(f"dvc.lock differs at {name}")
        files, expected = variants.contents(self.at), variants.contents(reference)
        unnamed = {path for paths in gone.values() for path in paths}
        for name in sorted({*files, *expected} - unnamed):
            if files.get(name) != expected.get(name):
                kind = "left over" if name not in expected else "lost" if name not in files else "other bytes"
                self.violations.append(f"{name}: {kind}")
        for file in [*(self.at / "data/runs").rglob(".*"), *(self.at / ".dvc/tmp").glob(".*")]:
            if PARTIAL.fullmatch(file.name):
                self.violations.append(f"{file.relative_to(self.at)}: left over")
        check = self._ask("prunequant", "check")
        if check.returncode or "does not know" in check.stdout:
            self.violations.append(f"prunequant check: {check.stdout}{check.stderr}")
        status = self._ask(*BARE[:-1], "status", "--json")
        if status.stdout.strip() != "{}":
            self.violations.append(f"dvc status: {status.stdout.strip()}{status.stderr.strip()}")
        table = self.at / ".dvc/tmp/rwlock"
        if table.exists() and any(read_json(table).values()):
            self.violations.append(f"rwlock holds {table.read_text()}")

    def _expected(self) -> float:
        """Return about how many seconds an undisturbed run would take from here."""
        reference, done = self.known.reference(self.goal), self._finished()
        todo = {name: entry for name, entry in variants.entries(reference).items() if name not in done}
        return self.pace * (12 + 2 * len(todo) + variants.seconds(reference, todo) / 2)

    def _finished(self) -> dict[str, tuple[Any, int]]:
        """Return the stages that DVC has saved as the goal wants them: the entry, the run record's time."""
        reference = self.known.reference(self.goal)
        goal = variants.entries(reference)
        stages = {}
        for name, entry in variants.entries(self.at).items():
            if (
                name in goal
                and variants.same(name, entry, goal[name])
                and variants.objects(self.at, entry) >= variants.objects(reference, entry)
            ):
                file = variants.record(self.at, name, entry)
                stages[name] = entry, file.stat().st_mtime_ns if file.exists() else 0
        return stages

    def _compare(self, before: dict[str, tuple[Any, int]], what: str) -> None:
        """Note each stage that ran again though it was finished before and no edit asked for it.

        A stage that was told to end may leave the record of its failure after DVC and the run are gone.
        """
        for name, (entry, time_of) in self._finished().items():
            if name != "code" and name in before and before[name][0] == entry and before[name][1] != time_of:
                record = variants.record(self.at, name, entry)
                if record.exists() and read_json(record)["state"] == "done":
                    self.violations.append(f"{what} computed {name} again")

    def _edit(self, variant: str) -> None:
        if variant != "comment":
            self.goal = variant
            self.known.apply(variant, self.at)
            return
        with (self.at / METHOD).open("a") as file:
            file.write("# a comment\n")

    def _start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as file:
            return subprocess.Popen(
                command, cwd=self.at, env=self.env, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
                # A shell's background job, which a drill may be part of, is born deaf to ctrl-C.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip

    def _ask(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=self.at, env=self.env, capture_output=True, text=True)

    def _hit(self, run: subprocess.Popen[bytes], hit: Hit) -> bool:
        """Hit the victim; return False if there is none at the moment."""
        if hit.victim == "disk":
            if os.geteuid():
                return False
            with (self.at.parent / "filler").open("wb") as file:
                stat = os.statvfs(self.at)
                with contextlib.suppress(OSError):  # a stage writes meanwhile, and the disk is full already
                    os.posix_fallocate(file.fileno(), 0, max(1, stat.f_bavail * stat.f_frsize - hit.room))
            return True
        if hit.victim == "all":
            return end(str(self.at))
        try:
            if hit.victim == "group":
                os.killpg(run.pid, SIGNALS[hit.signal])
                return True
            victims = self._who(hit.victim)
            if victims:
                victims[0].send_signal(SIGNALS[hit.signal])
            return bool(victims)
        except (psutil.NoSuchProcess, ProcessLookupError):
            return False

    def _make_room(self) -> None:
        (self.at.parent / "filler").unlink(missing_ok=True)

    def _who(self, role: str) -> list[psutil.Process]:
        """Return the living processes of a role."""
        return [process for process in living(str(self.at)) if role_of(words(process)) == role]

    def _stages(self) -> Iterator[str]:
        """Yield the names of the stages at work."""
        for process in self._who("stage"):
            with contextlib.suppress(psutil.Error):
                yield process.environ()["DVC_STAGE"]

    def _left(self, seconds: float) -> list[str]:
        """Wait until all processes of the round have ended; return the commands of those that have not."""
        deadline = time.monotonic() + seconds
        while (left := living(str(self.at))) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [" ".join(words(process)) for process in left]

    def _keep(self) -> None:
        """Keep the project of a round that broke a rule."""
        kept = self.known.folder / "kept" / self.at.name
        shutil.rmtree(kept, ignore_errors=True)
        finished.copy(self.at, kept)


def living(folder: str) -> list[psutil.Process]:
    """Return the living processes of rounds in a folder, the oldest first."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            mark = process.environ().get(MARK, "")
            if f"{mark}/".startswith(f"{folder}/") and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return processes


def end(folder: str) -> bool:
    """Kill all processes of rounds in a folder at once; return whether there were any."""
    processes = living(folder)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return bool(processes)


def words(process: psutil.Process) -> list[str]:
    """Return the command line of a process; nothing if it has just ended."""
    with contextlib.suppress(psutil.Error):
        return list(process.cmdline())
    return []


def role_of(command: list[str]) -> str:
    """Return which part of a run a command line is."""
    server = "uvicorn" in command
    if any(word.endswith("/flows/guard.py") for word in command):
        return "server's guard" if server else "guard"
    if any(word.startswith("stages.") for word in command) and "python" in command[0]:
        return "stage"
    if "dvc" in command:
        return "dvc"
    if server:
        return "server"
    return "flow" if any(word.endswith("/prunequant") for word in command) else ""


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Count kills by victim and signal; a cell is those of rounds that kept every rule, of all."""
    kills, kept = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for row in rows:
        hits = [(kill["victim"], kill["signal"]) for step in row["steps"] for kill in step["kills"]]
        kills.update(hits)
        kept.update([] if row["violations"] else hits)
    columns = (*SIGNALS, "full")
    shown = Table("victim", *columns, title=f"{kills.total()} kills in {len(rows)} rounds, recovered / all")
    for victim in VICTIMS[FLOW]:
        cells = [(kept[victim, column], kills[victim, column]) for column in columns]
        shown.add_row(victim, *(f"{good} / {count}" if count else "" for good, count in cells))
    return shown


def line(row: dict[str, Any]) -> str:
    """Return a round in a line."""
    steps = []
    for step in row["steps"]:
        kills = [
            f"{kill['signal']} {kill['victim']} at {kill['at']:.0f} s in "
            f"{', '.join(kill['running']) or 'no stage'}" for kill in step["kills"]
        ]  # fmt: skip
        steps.append(f"{step['command']}: {'; '.join(kills) or 'ended before'}")
    ending = "; ".join(row["violations"]) or "recovered"
    title = f"round {row['number']} ({row['start']} to {row['goal']}, {row['seconds']} s)"
    return " | ".join([title, *steps, ending])


@contextlib.contextmanager
def prepared(folder: Path, size: str) -> Iterator[Variants]:
    """Hold the folder, clear what a drill that was killed left there, and yield its variants.

    Raises:
        SystemExit: another drill works there, or its references are of other code.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another drill works in {folder}; end it, or give another --folder.") from None
        end(str(folder))
        if (folder / "disk").is_mount():
            subprocess.run(["umount", "-l", folder / "disk"], check=True)
        shutil.rmtree(folder / "rounds", ignore_errors=True)
        mark, origin = folder / "origin.json", variants.origin(SIZES[size])
        if mark.exists() and read_json(mark) != origin:
            raise SystemExit(
                f"{folder} holds a drill of other stages or of another --size; give another --folder."
            )
        write_json(mark, origin)
        yield Variants(folder, SIZES[size])


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="in all, those in the folder included")
    parser.add_argument("--folder", type=Path, help="where to keep everything; default: a temporary folder")
    parser.add_argument("--size", choices=SIZES, default="long", help="of the stages' work")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--round", type=int, help="repeat this round and no other, and print all about it")
    options = parser.parse_args(arguments)
    if len(options.variants) < 2:
        parser.error("--variants: name at least two, to edit from one into the other")
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="drill-"))).resolve()
    with prepared(folder, options.size) as known:
        if options.round is not None:
            rows = [Drill(draw(options.seed, options.round, options.variants), known).run()]
            show(json.dumps(rows[0], indent=2))
        else:
            rows = repeat(known, options)
    if any(row["violations"] for row in rows):
        raise SystemExit(1)


def repeat(known: Variants, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run rounds until there are enough kills; return all rounds of the folder."""
    results = known.folder / "rounds.jsonl"
    rows = [json.loads(text) for text in results.read_text().splitlines()] if results.exists() else []
    show(f"{known.folder}: {len(rows)} rounds are there")
    while sum(len(step["kills"]) for row in rows for step in row["steps"]) < options.kills:
        number, pace = (rows[-1]["number"] + 1, rows[-1]["pace"]) if rows else (0, 1.0)
        rows.append(Drill(draw(options.seed, number, options.variants), known, pace).run())
        with results.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        show(line(rows[-1]))
    Console().print(table(rows))
    return rows


if __name__ == "__main__":
    main()
