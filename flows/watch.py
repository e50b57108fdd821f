"""What a run shows while it works: how far it is, what runs, and about how long it will take.

    [23/51] 12:40, about 6 min left
    quantize@gptq-w4g64            ━━━━━━━━╸            43 % 13/30               0:52 of about 2:02
    graded@base/smollm2-arithmetic ━━━━━━━━━━━━━━━      76 % Likelihoods 364/480 0:31 of about 0:40

A terminal shows this under the lines that stay: stages that ended, and what our stages say of themselves. A
pipe, a CI job or `--plain` gets the same as lines of text, one of progress whenever nothing was said for ten
seconds. Whatever libraries print is in the stage's log in `data/runs/logs` alone, except that the last bar
drawn, by whomever, tells how far a stage is.

A stage is expected to take as long as its last run here, or else the median of its kind. The time left is
what that leaves to do, divided by the stages that fit side by side, but no less than the longest chain of
stages that wait for each other. It is multiplied by how much longer than expected this run's stages took.
"""

import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flows.graph import Graph
from flows.terminal import console

SILENCE = 10.0
"""Seconds without a line after which plain text says how far the run is."""
_AS_EXPECTED = 60.0
"""Seconds that count as if they had gone as expected: starting a short stage takes longer than its work."""
_BAR = re.compile(r"(?P<label>.*?):? *(?P<percent>\d+)%\|.*\| *(?P<count>\S+/\S+) \[.*")
"""A bar as tqdm draws it, such as `Likelihoods:  76%|███▌  | 364/480 [00:10<00:03, 34.25it/s]`."""


@dataclass
class _Running:
    """A stage at work: since when, by the monotonic clock, and the last bar that it drew."""

    since: float
    percent: int | None = None
    label: str = ""
    passed_on: float = field(default_factory=time.monotonic)
    """When a bar was last passed on."""


class Watch:
    """The progress of one run, on the terminal while `shown`."""

    def __init__(self, plain: bool = True) -> None:
        """Begin a run.

        Args:
            plain: print lines only, also where there is a terminal to draw on.
        """
        self._live = not plain and console.is_terminal and not console.is_dumb_terminal
        self._began = self._said = time.monotonic()
        self._doing = "looking for what is out of date"
        self._graph: Graph = {}
        self._todo: set[str] = set()
        self._width = 1.0
        self._expected: Mapping[str, float] = {}
        self._running: dict[str, _Running] = {}
        self._ended: set[str] = set()
        self._took = self._promised = 0.0
        self._lock = threading.RLock()

    def expect(self, graph: Graph, todo: list[str], width: float, seconds: Mapping[str, float]) -> None:
        """Take what the run will do.

        Args:
            graph: all its stages, upstream first.
            todo: those that may run.
            width: how many stages run side by side.
            seconds: what each is expected to take, as far as known.
        """
        with self._lock:
            self._graph, self._todo, self._width, self._expected = graph, set(todo), width, seconds
            self._doing = "starting Prefect"

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the progress until the body ends."""
        if self._live:
            with Live(get_renderable=self._drawn, console=console, transient=True):
                yield
            return
        over = threading.Event()
        beat = threading.Thread(target=self._beat, args=(over,), daemon=True)
        beat.start()
        try:
            yield
        finally:
            over.set()
            beat.join()

    def say(self, stage: str, line: str, style: str | None = None) -> None:
        """Print a line about a stage."""
        self._said = time.monotonic()
        console.print(f"{stage} | {line}", markup=False, soft_wrap=True, style=style)

    def starts(self, stage: str) -> None:
        """Note that a stage begins."""
        with self._lock:
            self._running[stage] = _Running(time.monotonic())
        if not self._live:
            self.say(stage, "starts")

    def hears(self, stage: str, line: str, prefix: str) -> bool:
        """Take a line that a stage printed; return whether it is worth passing on to Prefect.

        A bar moves the stage's bar and is worth it every ten seconds.

        Args:
            prefix: what begins the lines that the stage itself says; they are printed, others are not. Of a
                command that is not ours it is empty, and all are.
        """
        drawn, _, own = line.rpartition(prefix) if prefix else ("", "", line)
        if _BAR.fullmatch(drawn):  # a bar ends no line, so what is said next follows it
            self.hears(stage, drawn, prefix)
            line = prefix + own
        if bar := _BAR.fullmatch(line):
            with self._lock:
                now, running = time.monotonic(), self._running.setdefault(stage, _Running(time.monotonic()))
                running.percent = int(bar["percent"])
                label = bar["label"].removeprefix(prefix.removesuffix(": "))  # the row has the stage's name
                running.label = f"{label} {bar['count']}".strip()
                due = now - running.passed_on >= SILENCE
                running.passed_on = now if due else running.passed_on
                return due
        if line.startswith(prefix) and line.strip():
            self.say(stage, line.removeprefix(prefix))
            return True
        return False

    def ends(self, stage: str, ran: float | None = None) -> None:
        """Note that a stage ended.

        Args:
            ran: the seconds that it took; None if it did not run to its end.
        """
        with self._lock:
            self._running.pop(stage, None)
            self._ended.add(stage)
            if ran is not None and stage in self._expected:
                self._took, self._promised = self._took + ran, self._promised + self._expected[stage]

    def resumes(self, stage: str) -> None:
        """Note that a stage which failed will run again."""
        with self._lock:
            self._running.pop(stage, None)

    def headline(self) -> str:
        """Return how far the run is, such as `[23/51] 12:40, about 6 min left`."""
        with self._lock:
            clock = _clock(time.monotonic() - self._began)
            if not self._todo:
                return f"{self._doing}, {clock}"
            left, unknown = self._left()
            parts = [f"[{len(self._ended & self._todo)}/{len(self._todo)}] {clock}"]
            if left:
                parts.append(f"{_about(left)} left")
            if unknown:
                parts.append(f"stages of kinds that never ran here: {unknown}")
            return ", ".join(parts) if self._running or self._ended else f"{parts[0]}, {self._doing}"

    def _left(self) -> tuple[float, int]:
        """Return the seconds that the run may still take, and how many of its stages are not in them."""
        now, work, unknown = time.monotonic(), 0.0, 0
        pace = (self._took + _AS_EXPECTED) / (self._promised + _AS_EXPECTED)
        chain: dict[str, float] = {}
        for name in self._graph:  # upstream first
            rest = 0.0
            if name in self._todo - self._ended:
                unknown += name not in self._expected
                rest = self._expected.get(name, 0.0) * pace
                if name in self._running:
                    rest = max(0.0, rest - (now - self._running[name].since))
            work += rest
            chain[name] = rest + max((chain.get(up, 0.0) for up in self._graph[name].upstream), default=0.0)
        return max(work / self._width, *chain.values(), 0.0), unknown

    def _stages(self) -> list[tuple[str, int | None, str, str]]:
        """Return name, percent, last bar and clock of every stage at work."""
        now, rows = time.monotonic(), []
        for name, running in self._running.items():
            clock = _clock(now - running.since)
            expected = self._expected.get(name)
            about = f" of about {_clock(expected)}" if expected else ""
            rows.append((name, running.percent, running.label, f"{clock}{about}"))
        return rows

    def _drawn(self) -> Table:
        with self._lock:
            whole = Table.grid(expand=True)
            whole.add_row(Text(self.headline(), style="bold"))
            bars = Table.grid(padding=(0, 1))
            for _ in range(3):
                bars.add_column(no_wrap=True)
            bars.add_column(no_wrap=True, overflow="ellipsis")
            for name, percent, label, clock in self._stages():
                pulse = percent is None
                share = "" if percent is None else f"{percent:3} %"
                bar = ProgressBar(100, percent or 0, width=20, pulse=pulse)
                bars.add_row(Text(name), bar, share, Text(label, style="dim"), clock)
            whole.add_row(bars)
            return whole

    def _beat(self, over: threading.Event) -> None:
        """Print how far the run is whenever nothing was said for a while."""
        while not over.wait(min(1.0, SILENCE / 4)):
            with self._lock:
                if time.monotonic() - self._said < SILENCE - 1:
                    continue
                self._said = time.monotonic()
                stages = [
                    " ".join([name, *([] if percent is None else [f"{percent} %"]), clock])
                    for name, percent, _, clock in self._stages()
                ]
                console.print("; ".join([self.headline(), *stages]), markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _about(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 60:
        return "under a minute"
    return f"about {minutes} min" if minutes < 100 else f"about {minutes / 60:.1f} h"
