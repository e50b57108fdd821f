"""DVC's graph: its stages, which of them are stale, and what a run changed.

DVC owns the graph and the cache; this module only reads them. DVC's status lists the stages whose own inputs
or outputs differ from the lock. Whether a stage below them is stale is known only after they have run, when
`dvc.lock` holds their new hashes.
"""

import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from flows.terminal import console
from flows.workspace import Busy, insist, refuse_busy
from stages.core.errors import Refusal
from stages.core.files import PROVENANCE, RUNS, run_record

T = TypeVar("T")
DVC = (sys.executable, "-m", "dvc", "--wait-for-lock")


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml after its templates are filled in."""

    name: str
    cmd: str
    upstream: tuple[str, ...]
    outs: tuple[str, ...]
    memory_gib: float | None = None
    """The memory it declares in dvc.yaml: `meta: {memory_gib: 12}`."""

    @property
    def module(self) -> str:
        """The name of our stage that it runs, such as `prune`; empty for any other command."""
        named = re.search(r"\bstages\.(\w+)", self.cmd)
        return named[1] if named else ""

    @property
    def alone(self) -> bool:
        """Whether it measures time or energy, so nothing may run beside it."""
        return self.module == "profile"

    @property
    def record(self) -> Path:
        """The run record of its last run, named like its provenance file."""
        for out in map(Path, self.outs):
            if out.is_relative_to(PROVENANCE):
                return RUNS / out.relative_to(PROVENANCE)
        return run_record(self.module, "all")

    @property
    def prefix(self) -> str:
        """What begins every line that the stage says of itself; empty for a command that is not ours."""
        if not self.module:
            return ""
        return f"{self.module} {self.record.relative_to(RUNS / self.module).with_suffix('')}: "


Graph = dict[str, Stage]
"""Stages by name, each after all it depends on."""


class Project:
    """The project in the current folder as DVC reads it; see `opened`."""

    def __init__(self, repo: Any) -> None:
        """Take an open `dvc.repo.Repo`."""
        self._repo = repo

    def graph(self) -> Graph:
        """Return the whole graph.

        Raises:
            Refusal: DVC cannot read dvc.yaml.
        """
        import networkx
        from dvc.exceptions import DvcException

        try:
            graph = self._repo.index.graph
        except DvcException as error:
            raise Refusal(f"DVC cannot read the graph: {error}") from None
        stages: Graph = {}
        for stage in reversed(list(networkx.topological_sort(graph))):
            stages[stage.addressing] = Stage(
                name=stage.addressing,
                cmd=str(stage.cmd),
                upstream=tuple(sorted(up.addressing for up in graph.successors(stage))),
                outs=tuple(out.def_path for out in stage.outs),
                memory_gib=_declared(stage.addressing, stage.meta),
            )
        return stages

    def changes(self) -> dict[str, list[str]]:
        """Return the stages whose own command, inputs or outputs differ from dvc.lock, and what differs.

        Raises:
            Busy: a DVC command works here.
            Refusal: DVC cannot tell.
        """
        from dvc.dependency import param
        from dvc.exceptions import DvcException
        from dvc.lock import LockError

        refuse_busy()
        # DVC would parse params.yaml once for each stage.
        with mock.patch.object(param, "load_path", cache(param.load_path)):
            try:
                status = self._repo.status()
            except LockError as error:
                raise Busy(str(error)) from None
            except DvcException as error:
                raise Refusal(f"DVC cannot tell what is stale: {error}") from None
        return {name: list(_changes(entries)) for name, entries in status.items()}

    def stale(self) -> set[str]:
        """Return the stages whose own command, inputs or outputs differ from dvc.lock; see `changes`."""
        return set(self.changes())


def _changes(entries: Iterable[Any]) -> Iterator[str]:
    """Put what DVC's status says of a stage into words, such as `prune.wanda-50 is modified`."""
    for entry in entries:
        if not isinstance(entry, dict):  # such as `changed command`
            yield str(entry)
            continue
        for changed in entry.values():
            for path, state in changed.items():
                if isinstance(state, dict):  # of a file of params, by key
                    yield from (f"{key} is {word}" for key, word in state.items())
                else:
                    yield f"{path} is {state}"


@contextmanager
def opened() -> Iterator[Project]:
    """Read dvc.yaml and dvc.lock once for all that the body asks, while no DVC command can write the lock.

    Raises:
        Refusal: this is no DVC project.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo, lock_repo

    try:
        repo = Repo(_wait_for_lock=True)
    except DvcException as error:
        raise Refusal(f"DVC cannot read the graph: {error}") from None
    with repo, lock_repo(repo):
        yield Project(repo)


def consult(question: Callable[[Project], T]) -> T:
    """Ask the project in the current folder; while a DVC command works here, wait without DVC's lock.

    A `dvc repro` needs that lock again when its stage ends, and gives up after three seconds.
    """

    def attempt() -> T:
        with opened() as project:
            return question(project)

    return insist(attempt, console.print)


def read_graph() -> Graph:
    """Read the whole graph of the project in the current folder; see `Project.graph`."""
    return consult(Project.graph)


def _declared(name: str, meta: Any) -> float | None:
    """Return the memory that a stage declares.

    Raises:
        Refusal: it is no positive number.
    """
    value = meta.get("memory_gib") if isinstance(meta, dict) else None
    if value is None or (type(value) in (int, float) and 0 < value < math.inf):
        return value
    raise Refusal(f"{name}: meta.memory_gib in dvc.yaml is {value!r}; write GiB as a positive number.")


def select(graph: Graph, targets: Iterable[str]) -> Graph:
    """Return the part of the graph that makes `targets`, all of it if there are none.

    Args:
        targets: a stage (`prune@wanda-50`), a group of stages (`prune`) or an artifact (`prune/wanda-50`).

    Raises:
        Refusal: some targets match no stage or artifact; the message lists all of these.
    """
    names: dict[str, set[str]] = {}
    for stage in graph.values():
        outs = [out.removeprefix("data/").removeprefix("models/") for out in stage.outs]
        for name in (stage.name, stage.name.split("@")[0], *stage.outs, *outs):
            names.setdefault(name, set()).add(stage.name)
    wanted = list(targets)
    unknown = [target for target in wanted if target not in names]
    if unknown:
        lines = [f"there is no stage or artifact {target!r}{_like(target, names)}" for target in unknown]
        raise Refusal("; ".join(lines) + ".\n`dvc stage list` shows all of them.")
    todo = [stage for target in wanted for stage in names[target]] or list(graph)
    kept: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in kept:
            kept.add(name)
            todo += graph[name].upstream
    return {name: stage for name, stage in graph.items() if name in kept}


def below(graph: Graph, names: set[str]) -> set[str]:
    """Return `names` and every stage that depends on them, directly or not."""
    dependent = set(names)
    for stage in graph.values():  # upstream stages come first
        if dependent & set(stage.upstream):
            dependent.add(stage.name)
    return dependent


def measured_last(names: list[str], graph: Graph) -> list[str]:
    """Order stages, upstream first, so that those that measure come after all that needs no measurement.

    The report and what is below it come last, measured or not.
    """
    alone = {name for name in graph if graph[name].alone}
    last = below(graph, alone | {name for name in graph if graph[name].module == "report"}) - alone
    return sorted(names, key=lambda name: 2 if name in last else int(name in alone))


def _like(target: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(target, list(names), 1)
    return f", did you mean {close[0]!r}?" if close else ""
