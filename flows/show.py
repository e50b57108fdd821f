"""Print a diff as tables on the terminal."""

from collections import Counter
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stages.reporting.margins import worded

_ITEMS = 20
"""Flipped items shown; `--json` has all."""


def show_diff(diff: dict[str, Any], console: Console) -> None:
    """Print every part of a diff that is not empty, warnings last."""
    old, new = diff["revisions"]
    changed = [part for part in ("verdicts", "params", "artifacts", "scores", "flipped") if diff[part]]
    if not changed:
        console.print(f"{old} and {new}: the same params, artifacts and scores.", markup=False)
    if diff["verdicts"]:
        turned = [
            (f"{v['study']}: {v['hypothesis']}", v["old"] or "–", v["new"] or "–", v["why"] or "")
            for v in diff["verdicts"]
        ]
        _table(console, "Verdicts", ("hypothesis", old, new, "why"), turned)
    if diff["params"]:
        _table(console, "Params", ("key", old, new), [(p["key"], p["old"], p["new"]) for p in diff["params"]])
    if diff["artifacts"]:
        rows = [(a["path"], a["change"], _tensors(a.get("tensors"))) for a in diff["artifacts"]]
        _table(console, "Artifacts", ("output", "change", "tensors"), rows)
    if diff["scores"]:
        _table(
            console,
            "Scores",
            ("candidate", "measure", old, new, "difference", "noise", "verdict"),
            [_score(row) for row in diff["scores"]],
        )
        if sentence := _families(diff["scores"]):
            console.print(sentence, markup=False)
    if diff["flipped"]:
        _flipped(console, diff["flipped"], old, new)
    for warning in diff["warnings"]:
        console.print(f"different conditions: {warning}", style="yellow", markup=False)
    for gap in diff["missing"]:
        count, revision = len(gap["outputs"]), gap["revision"]
        console.print(
            f"The cache lacks {count} output(s) of {revision}; what depends on them is left out. Fetch them:",
            style="yellow",
            markup=False,
        )
        console.print(f"  {gap['command']}", style="yellow", markup=False, soft_wrap=True)


def _tensors(differences: dict[str, Any] | None) -> str:
    if differences is None:
        return ""
    lines = [f"{differences['changed']} of {differences['tensors']} differ"]
    for side in ("only_old", "only_new", "reshaped"):
        if names := differences[side]:
            lines.append(f"{side.replace('_', ' ')}: {len(names)}, such as {names[0]}")
    for tensor in differences["largest"]:
        largest = tensor["max_abs_difference"]
        reach = "" if largest is None else f", by up to {largest:.3g}"
        lines.append(f"{tensor['name']}: {tensor['share']:.1%}{reach}")
    return "\n".join(lines)


def _score(row: dict[str, Any]) -> tuple[Any, ...]:
    level = "" if row["difficulty"] == "all" else f" {row['difficulty']}"
    return (
        row["candidate"],
        f"{row['suite']}{level} {row['readout']} {row['label']}",
        *(row[name] for name in ("old", "new", "difference", "noise")),
        worded(row),
    )


def _families(scores: list[dict[str, Any]]) -> str:
    """Say over how many comparisons the verdicts' p-values are corrected; empty without comparisons."""
    size = max((row["family"] or 0 for row in scores), default=0)
    if not size:
        return ""
    return f"verdicts: p <= 0.05 after Holm's correction over the {size:.0f} headline scores compared"


def _flipped(console: Console, items: list[dict[str, Any]], old: str, new: str) -> None:
    counts = Counter((i["candidate"], i["suite"], i["readout"], i["became"]) for i in items)
    for (candidate, suite, readout, became), count in counts.items():
        console.print(f"{candidate} on {suite}, {readout}: {count} item(s) became {became}", markup=False)
    rows = [
        (i["candidate"], f"{i['suite']} {i['readout']} {i['doc_id']}", i["difficulty"], i["target"],
         i["response_old"], i["response_new"], i["became"])
        for i in items[:_ITEMS]
    ]  # fmt: skip
    title = f"Flipped items ({min(_ITEMS, len(items))} of {len(items)})"
    _table(console, title, ("candidate", "item", "difficulty", "target", old, new, "became"), rows)


def _table(console: Console, title: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in columns:
        table.add_column(escape(column), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))
