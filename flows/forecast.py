"""Forecast: which stages a run would execute, why, and what stages of their kind took on this machine.

DVC tells what is stale; whatever depends on that may be stale too, which only a run finds out. The minutes
of a stage are those of its own last run here, if dvc.lock has it and all above it with the settings that
params.yaml has now. Otherwise they are the median over stages that do the same to the same base: a method, or
a suite, whatever their steps and samples. Without any there are none.
"""

import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table

from flows import graph
from flows.graph import Graph, Stage
from stages.core.files import read_json
from stages.core.schema import RECIPES
from stages.job.load import PARAMS, load, read
from stages.job.locked import locked_stages
from stages.job.params import SUITES, Params

_REASONS = 3
"""Reasons shown of a kind."""


class StageKind(NamedTuple):
    """The stages of one kind."""

    kind: str
    """Such as `quantize gptq, smollm2`."""
    stages: int
    would_run: int
    measured: int
    """How many of those that would run have run here before."""
    minutes: float | None
    """CPU minutes of those that would run; None if no stage of the kind has run here."""
    why: str
    """Why they would run, the commonest reason first; empty if none would."""


def forecast() -> list[StageKind]:
    """Return a row for each kind of stage, upstream first.

    Raises:
        Refusal: params.yaml has mistakes, or DVC cannot read the graph.
    """
    params, raw = load(device=False), read()
    stages, changes = graph.consult(lambda project: (project.graph(), project.changes()))
    stale = set(changes)
    todo = graph.below(stages, stale - {"validate"}) | stale  # sound params leave what it writes as it is
    same = _unchanged(stages, raw)
    kinds: dict[str, list[str]] = {}
    for name in stages:
        kinds.setdefault(_kind(name, params), []).append(name)
    rows = []
    for kind, names in kinds.items():
        seconds = {
            name: value
            for name in names
            if name in same and (value := _last(stages[name], "cpu_seconds")) is not None
        }
        running = [name for name in names if name in todo]
        minutes = None
        if seconds or not running:
            usual = statistics.median(seconds.values()) if seconds else 0.0
            minutes = sum(seconds.get(name, usual) for name in running) / 60
        why = _why(running, changes)
        rows.append(
            StageKind(kind, len(names), len(running), len(seconds.keys() & set(running)), minutes, why)
        )
    return rows


def forecast_table(rows: list[StageKind]) -> Table:
    """Return what would run ready to print, with its sum."""
    running = [row for row in rows if row.would_run]
    table = Table("stages", box=box.SIMPLE)
    for column in ("would run", "of these measured here", "CPU minutes"):
        table.add_column(column, justify="right")
    table.add_column("why")
    for row in running:
        minutes = "none ran here" if row.minutes is None else f"{row.minutes:.1f}"
        table.add_row(row.kind, str(row.would_run), str(row.measured), minutes, escape(row.why))
    more = " and more" if any(row.minutes is None for row in running) else ""
    table.add_row(
        "all", f"{sum(row.would_run for row in rows)} of {sum(row.stages for row in rows)}",
        str(sum(row.measured for row in running)),
        f"{sum(row.minutes or 0.0 for row in running):.1f}{more}", "",
    )  # fmt: skip
    return table


def _why(names: list[str], changes: Mapping[str, list[str]]) -> str:
    """Say why stages run; a stage without a change of its own runs as a stage above it does."""
    entries = locked_stages()
    counts = Counter[str]()
    for name in names:
        if name not in entries:
            counts["never ran"] += 1
        elif name in changes:
            counts.update(changes[name])
        else:
            counts["a stage above it runs"] += 1
    shown = [reason for reason, _ in counts.most_common(_REASONS)]
    return ", ".join([*shown, *([f"{len(counts) - _REASONS} more"] if len(counts) > _REASONS else [])])


def _kind(name: str, params: Params) -> str:
    """Return what a stage of DVC does and, where it reads a model, to which base."""
    group, _, key = name.partition("@")
    if group in SUITES:  # the name is <candidate>-<suite>
        suite = max((suite for suite in params.suites.by_name() if key.endswith(f"-{suite}")), key=len)
        return f"evaluate {suite}, {params.base_of(key.removesuffix(f'-{suite}'))}"
    if group in RECIPES:
        method = getattr(getattr(params, group)[key], "method", "")
        return f"{group} {method}".rstrip() + f", {params.base_of(f'{group}/{key}')}"
    return f"profile, {params.base_of(key)}" if group == "profile" else group


def _unchanged(stages: Graph, raw: Mapping[str, Any]) -> set[str]:
    """Return the stages that dvc.lock has, and all above them too, with the settings in params.yaml."""
    entries, same = locked_stages(), set[str]()
    for name, stage in stages.items():
        if name in entries and same.issuperset(stage.upstream):
            settings = entries[name].get("params", {}).get(str(PARAMS), {})
            if all(_setting(raw, key) == value for key, value in settings.items()):
                same.add(name)
    return same


def _setting(raw: Mapping[str, Any], key: str) -> Any:
    """Return what params.yaml has at a path such as `prune.wanda-50`; None if nothing."""
    value: Any = raw
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def expected_seconds(stages: Graph, params: Params) -> dict[str, float]:
    """Return what stages are expected to take: the seconds of their last run here, or those of their kind."""
    kinds: dict[str, list[str]] = {}
    for name in stages:
        kinds.setdefault(_kind(name, params), []).append(name)
    expected: dict[str, float] = {}
    for names in kinds.values():
        seconds = {name: value for name in names if (value := _last(stages[name], "seconds")) is not None}
        if seconds:
            expected |= {name: seconds.get(name, statistics.median(seconds.values())) for name in names}
    return expected


def _last(stage: Stage, figure: str) -> float | None:
    """Return a figure of a stage's last run here, None if it failed or never ran."""
    record: dict[str, Any] = read_json(stage.record) if stage.record.exists() else {}
    return record.get(figure) if record.get("state") == "done" else None
