"""Who runs when: each stage takes what it needs of the machine and gives it back at its end.

A stage needs CPU threads, memory, and a card if it computes on one. Stages wait in the order they came. The
first in line has its needs set aside as they become free, so it gets its turn, however much it needs. The
others may overtake it if they fit in what remains: a stage on the CPU runs while an earlier one waits for a
card.

A stage on a card takes no thread of the pool, as one thread per card is set aside to feed it. Memory is a
forecast that nobody enforces: `meta: {memory_gib: 12}` of the stage in dvc.yaml, or else the peak of its last
run with some room, or else a guess from the size of what it reads.
"""

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flows import machine
from flows.graph import Graph, Stage
from stages.core.files import MODELS, read_json
from stages.core.run import Run
from stages.job.pieces import STAGES

GIB = 2**30
_SPARE = 1.25
"""Room over the peak of the last run."""
_LIBRARIES, _COPIES = 1.0, 4.0
"""A guess for a stage that never ran: GiB of the process alone, and bytes for each byte it reads."""


@dataclass(frozen=True)
class Need:
    """What a stage needs while it runs."""

    threads: int = 1
    gib: float = 0.0
    """Memory."""
    card: bool = False
    alone: bool = False
    """Whether nothing may run beside it."""


@dataclass(eq=False)
class Lease:
    """What a stage waits for or holds."""

    need: Need
    card: str | None = None
    beside: bool = False
    """Whether any other stage ran while it was held."""
    occupied: int = 0
    """Bytes that others had on the card when it was granted."""
    granted: threading.Event = field(default_factory=threading.Event)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that show a stage its card and no other."""
        return {machine.VISIBLE: self.card} if self.card else {}


class Pool:
    """Threads, memory and cards, shared by the stages of a run."""

    def __init__(
        self,
        threads: int,
        gib: float = math.inf,
        cards: tuple[str, ...] = (),
        jobs: int | None = None,
    ) -> None:
        """Take what there is.

        Args:
            gib: memory.
            cards: names for `CUDA_VISIBLE_DEVICES`, a stage each. The name "" is a card that stages find by
                themselves.
            jobs: stages side by side at most; None for as many as have room.
        """
        self.threads, self.gib, self.cards = threads, gib, cards
        self._jobs = jobs or math.inf
        self._waiting: list[Lease] = []
        self._held: list[Lease] = []
        self._lock = threading.Lock()

    def __str__(self) -> str:
        parts = [f"CPU threads: {self.threads}", f"memory: {self.gib:.1f} GiB"]
        parts += [f"cards: {len(self.cards)}"] if self.cards else []
        return ", ".join([*parts, f"stages at most: {self._jobs}"] if self._jobs < math.inf else parts)

    def share(self, threads: int) -> float:
        """Return the memory that goes with so many threads if all are used, in GiB."""
        return self.gib * min(threads, self.threads) / self.threads

    def width(self, threads: int) -> float:
        """Return how many stages of so many threads run side by side."""
        return min(self._jobs, len(self.cards) or max(1, self.threads // threads))

    def fitted(self, need: Need) -> Need:
        """Return a need that the whole pool can serve; one with more memory than there is runs alone."""
        card = need.card and bool(self.cards)
        return Need(
            threads=0 if card else min(need.threads, self.threads),
            gib=min(need.gib, self.gib),
            card=card,
            alone=need.alone or need.gib > self.gib,
        )

    @contextmanager
    def hold(self, need: Need) -> Iterator[Lease]:
        """Wait for what a stage needs, and hold it while the body runs."""
        lease = self.request(need)
        try:
            lease.granted.wait()
            if lease.card:
                lease.occupied = machine.occupied(lease.card)
            yield lease
        finally:
            self.release(lease)

    def request(self, need: Need) -> Lease:
        """Get in line."""
        lease = Lease(self.fitted(need))
        with self._lock:
            self._waiting.append(lease)
            self._serve()
        return lease

    def release(self, lease: Lease) -> None:
        """Give everything back, or leave the line."""
        with self._lock:
            (self._held if lease in self._held else self._waiting).remove(lease)
            self._serve()

    def _serve(self) -> None:
        """Grant what is free: to the first in line, then to others what the first does not need."""
        for lease in list(self._waiting):
            first = self._waiting[0]
            if self._has_room(lease.need, Need(0) if lease is first else first.need):
                self._waiting.remove(lease)
                self._grant(lease)

    def _has_room(self, need: Need, aside: Need) -> bool:
        """Tell whether a stage may start while what is `aside` stays free."""
        if need.alone or aside.alone or any(lease.need.alone for lease in self._held):
            return not (self._held or aside.alone)
        taken = [aside, *(lease.need for lease in self._held)]
        kinds = (
            (need.threads, sum(other.threads for other in taken), self.threads),
            (need.gib, sum(other.gib for other in taken), self.gib),
            (need.card, sum(other.card for other in taken), len(self.cards)),
        )
        return len(self._held) < self._jobs and all(
            not wanted or wanted + used <= there for wanted, used, there in kinds
        )

    def _grant(self, lease: Lease) -> None:
        if lease.need.card:
            taken = {other.card for other in self._held}
            lease.card = next(card for card in self.cards if card not in taken)
        for other in self._held:
            other.beside = lease.beside = True
        self._held.append(lease)
        lease.granted.set()


def need_of(stage: Stage, graph: Graph, pool: Pool, threads: int) -> Need:
    """Return what a stage needs.

    Args:
        threads: `run.threads`, those of a stage that computes; any other takes 1.
    """
    computes = stage.module in STAGES and STAGES[stage.module].computes
    threads = threads if computes else 1
    gib = stage.memory_gib or _last_peak(stage) * _SPARE
    if not gib:
        read = sum(_size(Path(out)) for name in stage.upstream for out in graph[name].outs) if computes else 0
        gib = _LIBRARIES + _COPIES * read / GIB if read else pool.share(threads)
    return Need(threads, gib, card=computes, alone=stage.alone)


def pool_of(run: Run, jobs: int | None = None) -> Pool:
    """Return what this process may use of the machine for stages with these settings.

    Raises:
        Refusal: this machine lacks `run.device`.
    """
    cards = _cards(run)
    return Pool(max(1, machine.threads() - len(cards)), machine.memory() / GIB, cards, jobs)


def _cards(run: Run) -> tuple[str, ...]:
    """Return the cards to hand out; none where stages compute on the CPU.

    A device with a number, such as `cuda:1`, is one card, and so is a device that is not CUDA's: stages find
    it by themselves and take turns.
    """
    if run.device == "cpu" or (run.device == "auto" and not machine.has_driver()):
        return ()
    device = run.resolved_device()
    if device.type == "cpu":
        return ()
    if device.type != "cuda" or device.index is not None:
        return ("",)
    from torch.cuda import device_count

    if machine.VISIBLE in os.environ:
        return machine.cards()[: device_count()]
    return machine.cards() or tuple(map(str, range(device_count())))


def _last_peak(stage: Stage) -> float:
    """Return the peak of the stage's last run in GiB; 0 if there is none."""
    try:
        record = read_json(stage.record)
        return float(record["peak_gib"]) if record["state"] == "done" else 0.0
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _size(path: Path) -> int:
    """Return the bytes of a model; of anything else 0."""
    if not path.is_relative_to(MODELS):
        return 0
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
