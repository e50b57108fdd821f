"""The scores of candidates on the terminal, and all that is known of a candidate.

A score stands beside what it takes to read it: its interval, its share of the base's score, the floor that
responders without knowledge reach, the word for the difference (see `stages.reporting.margins`), and the size
of the model. The report writes these rows into `data/report/headlines.csv`. `prunequant show` computes them
from the results that are there, also if there is no report yet; fewer results make a smaller family of
comparisons, so a word may differ from that of the whole report.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stages.core.errors import Refusal
from stages.core.files import MODELS, RECORD, REPORT, RESULTS, read_json
from stages.core.tables import SCORES
from stages.job import lineage
from stages.job.locked import locked_stages
from stages.job.locked import outs as locked_outs
from stages.job.params import Params
from stages.job.pieces import dvc_name
from stages.job.sentences import allowed
from stages.reporting.words import number, size

_NAME, _VERDICT = 9, 8
"""The least widths of the two columns that wrap; with them the table fits a terminal of 80 characters."""
_REPORTED = REPORT / "headlines.csv"


class Shown(NamedTuple):
    """The scores of some candidates, and what keeps them from being whole."""

    scores: list[dict[str, Any]]
    """Rows with the columns of `stages.reporting.export.headline_scores`, None where missing."""
    notes: list[str]


def summarized() -> list[dict[str, Any]]:
    """Return the rows that the report wrote; none if there is no report."""
    if not _REPORTED.exists():
        return []
    with _REPORTED.open(encoding="utf-8", newline="") as file:
        return [{key: _read(value) for key, value in row.items()} for row in csv.DictReader(file)]


def computed(params: Params, candidates: Sequence[str] = ()) -> Shown:
    """Compare the results that are in `data/results`.

    Args:
        candidates: return the rows of these alone; empty: all.

    Raises:
        Refusal: there are no results, or a candidate is unknown.
    """
    if unknown := [name for name in candidates if name not in params.evaluate.candidates]:
        raise Refusal(f"{unknown[0]!r} is no candidate; {allowed(params.evaluate.candidates, unknown[0])}.")
    wanted = params.evaluations()
    there = [name for name in wanted if (RESULTS / name / SCORES).exists()]
    if not there and not candidates:
        raise Refusal(_unread(params, wanted))
    shown = _compared(params, there) if there else []
    shown = [row for row in shown if not candidates or row["candidate"] in candidates]
    missing = [name for name in wanted if name not in there]
    missing = [name for name in missing if not candidates or name.rpartition("/")[0] in candidates]
    notes = [f"not evaluated yet: {', '.join(missing)}"] if missing else []
    if len(there) < len(wanted):
        notes.append(f"words compare the {len(there)} of {len(wanted)} evaluations that are there")
    remade = [name for name in candidates or params.evaluate.candidates if edited(params, name)]
    if remade:
        notes.append(f"made by other recipes than params.yaml has now: {', '.join(remade)}; `prunequant run`")
    return Shown(shown, notes)


def _unread(params: Params, evaluations: Sequence[str]) -> str:
    """Say why there are no results: dvc.lock knows of some, which may be at the remote, or of none."""
    known = locked_outs(locked_stages()).keys() & {str(RESULTS / name) for name in evaluations}
    if not known:
        return "nothing is evaluated yet; `prunequant run` evaluates what params.yaml lists."
    stages = [dvc_name("evaluate", params, name) for name in evaluations if str(RESULTS / name) in known]
    kinds = " ".join(dict.fromkeys(stage.partition("@")[0] for stage in stages))
    return (
        f"no result is here, but dvc.lock knows {len(known)}; `dvc checkout {kinds}` takes them from the "
        f"cache, `dvc pull {kinds}` from the DVC remote."
    )


def _compared(params: Params, evaluations: list[str]) -> list[dict[str, Any]]:
    from stages.reporting.collect import collect, records  # these take seconds
    from stages.reporting.comparison import compare_candidates
    from stages.reporting.export import headline_scores

    results = collect(evaluations, params.evaluate.candidates, list(params.suites.by_name()))
    return records(headline_scores(compare_candidates(results, params.report)))


def described(params: Params, candidate: str) -> dict[str, Any]:
    """Return a candidate's lineage, recipes, suites and sizes, and the commands that make and score it."""
    record = _record(candidate)
    recipes = params.recipes()
    line = [name for name in recipes if name in {candidate, *lineage.ancestors(params, candidate)}]
    base = params.base_of(candidate)
    settings = {name: recipes[name].model_dump(mode="json", exclude_unset=True) for name in line}
    suites = {
        name: suite.model_dump(mode="json", exclude_unset=True)
        for name, suite in params.suites.by_name().items()
    }
    section, _, key = candidate.partition("/")
    stage = "download" if section == "base" else section
    target = dvc_name(stage, params, candidate if section == "base" else key)
    evaluations = [dvc_name("evaluate", params, f"{candidate}/{suite}") for suite in suites]
    return {
        "candidate": candidate,
        "lineage": [f"base/{base}", *line],
        "source": params.models[base].source if base else None,
        "recipes": settings,
        "suites": suites,
        "sizes": {
            key: record.get(key) for key in ("sparsity", "bits_per_weight", "bytes_ideal", "bytes_on_disk")
        },
        "folder": str(MODELS / candidate) if record else None,
        "commands": {
            "make": f"prunequant run {target}",
            "evaluate": f"prunequant run {' '.join(evaluations)}",
            "see what its suites ask": f"prunequant cost {candidate}",
        },
    }


def show_scores(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print a table a measure with a line a candidate; of a single candidate one with a line a measure."""
    single = len({row["candidate"] for row in rows}) == 1
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        better = "higher" if row["higher_is_better"] else "lower"
        measure = f"{row['suite']}: {row['label']} ({better} is better)"
        title, line = (row["candidate"], measure) if single else (measure, row["candidate"])
        groups.setdefault(title, []).append({**row, "line": line})
    for title, lines in groups.items():
        console.print(_score_table(title, lines, gap=2 if console.width >= 100 else 1))


def _score_table(title: str, lines: Sequence[Mapping[str, Any]], gap: int) -> Table:
    table = Table(
        title=escape(title), title_justify="left", box=box.SIMPLE, padding=(0, gap, 0, 0), pad_edge=False
    )
    table.add_column("", overflow="fold", min_width=_NAME)
    based = all(row["reference"] is None or row["reference"].startswith("base/") for row in lines)
    floors = any(row["floor"] is not None for row in lines)
    figures = ["score", "95 % interval", "of base" if based else "of reference"]
    for column in [*figures, "floor"] if floors else figures:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", min_width=_VERDICT)
    for column in ("on disk", "bits a\nweight"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in lines:
        cells = _cells(row)
        if not floors:
            del cells["floor"]
        table.add_row(escape(row["line"]), *cells.values())
    return table


def readable(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the rows as people read them: few columns, rounded, the name of a candidate first."""
    return [
        {"candidate": row["candidate"], "suite": row["suite"], "measure": row["label"], **_cells(row)}
        for row in rows
    ]


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    low, high = (number(row[end], row["metric"]) for end in ("low", "high"))
    share, floor = row["of_reference"], row["floor"]
    return {
        "score": number(row["value"], row["metric"]),
        "95 % interval": f"{low} to {high}",
        "of reference": "" if share is None else f"{100 * share:.0f} %",
        "floor": "" if floor is None else number(floor, row["metric"]),
        "verdict": row["word"] or "",
        "on disk": size(row["bytes_on_disk"]),
        "bits a weight": f"{row['bits_per_weight']:.2f}",
    }


def show_described(facts: Mapping[str, Any], console: Console) -> None:
    """Print what is known of a candidate."""
    lines = [
        f"{facts['candidate']}: {' → '.join(facts['lineage'])}, from {facts['source']}",
        *(f"  {name}: {_flow(settings)}" for name, settings in facts["recipes"].items()),
        *(f"  suite {name}: {_flow(settings)}" for name, settings in facts["suites"].items()),
        *(f"  to {what}: {line}" for what, line in facts["commands"].items()),
        f"  in {facts['folder']}" if facts["folder"] else "  not made yet",
    ]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _flow(settings: Any) -> str:
    return yaml.safe_dump(settings, default_flow_style=True, sort_keys=False, width=10**6).strip()


def _record(candidate: str) -> dict[str, Any]:
    file = MODELS / candidate / RECORD
    return dict(read_json(file)) if file.exists() else {}


def edited(params: Params, candidate: str) -> bool:
    """Tell whether a model was made by recipes that params.yaml no longer has like this."""
    recipes = params.recipes()
    recorded = _record(candidate).get("recipes", {})
    now = {name: recipes[name].model_dump(mode="json") for name in recorded if name in recipes}
    return recorded != json.loads(json.dumps(now))


def _read(text: str) -> Any:
    """Return a field of a CSV file as pandas wrote it: a number, a truth, a text, or None where missing."""
    if text in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[text]
    try:
        return float(text)
    except ValueError:
        return text
