"""A diff as titled tables of texts, the same for the terminal, Markdown and HTML.

What a model, a data set or a person wrote is a `Quote`, which each form shows in its own way and never reads
as markup.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flows.changes.revisions import lacking_results
from stages.reporting.margins import worded
from stages.reporting.words import MINUS, SHARES, answer_text, number, p_value, size

NAMED = 4
"""Stages and tensors named in a cell; the JSON has all."""


@dataclass(frozen=True)
class Quote:
    """A text that somebody else wrote."""

    text: str
    from_end: bool = False
    """Whether its end matters, as in a prompt, whose question stands behind the examples."""

    def clipped(self, length: int) -> str:
        """Return it on one line, cut to `length` characters, without control characters."""
        line = " ".join("".join(c if c.isprintable() else " " for c in self.text).split())
        if len(line) <= length:
            return line
        return f"…{line[-length:]}" if self.from_end else f"{line[:length]}…"


@dataclass(frozen=True)
class Section:
    """A table with a title; where it has no rows, its notes alone."""

    title: str
    columns: tuple[str, ...] = ()
    rows: Sequence[tuple[str | Quote, ...]] = ()
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    detail: bool = False
    """Whether it may be folded, or cut on the terminal."""


def heading(diff: dict[str, Any]) -> str:
    """Return what is compared."""
    if diff["candidates"]:
        first, *others = diff["candidates"]
        return f"{', '.join(others)} beside {first}, in {diff['revisions'][0]}"
    return f"from {diff['revisions'][0]} to {diff['revisions'][1]}"


def columns_of(diff: dict[str, Any]) -> tuple[str, str]:
    """Return the names of the two columns of values."""
    if diff["candidates"]:
        return diff["candidates"][0], "candidate"
    return diff["revisions"][0], diff["revisions"][1]


def summary(diff: dict[str, Any]) -> list[str]:
    """Return sentences with the totals; one that says so if nothing differs."""
    parts = ("verdicts", "params", "artifacts", "scores", "flipped")
    if not any(diff[part] for part in parts):
        return [f"{' and '.join(columns_of(diff))}: the same params, artifacts and scores."]
    lines = []
    if not diff["scores"] and not diff["missing"]:
        lines.append("No score differs.")
    if words := Counter(row["verdict"] for row in diff["scores"] if row["verdict"]):
        lines.append(f"Scores: {', '.join(f'{count} {word}' for word, count in words.most_common())}.")
    if lacking := [gap["revision"] for gap in diff["missing"] if lacking_results(gap)]:
        lines.append(
            f"Scores are left out: the cache lacks results of {' and '.join(lacking)}; add --fetch results."
        )
    if diff["uncompared"]:
        names = f"{', '.join(diff['uncompared'])} and {diff['candidates'][0]}"
        lines.append(f"Not compared: {names} have no score in common.")
    if turned := Counter(item["became"] for item in diff["flipped"]):
        lines.append(f"Answers: {', '.join(f'{count} became {word}' for word, count in turned.items())}.")
    if diff["verdicts"]:
        lines.append(f"Hypotheses: {len(diff['verdicts'])} verdict(s) turned.")
    if data := [row for row in diff["incomparable"] if row["kind"] == "data"]:
        lines.append(
            f"Not comparable: {len({name for row in data for name in row['of']})} score(s) on other data."
        )
    return lines


def sections(diff: dict[str, Any]) -> list[Section]:
    """Return every part of a diff that is not empty."""
    parts = [
        _verdicts(diff), _incomparable(diff), _scores(diff, levels=False), _flipped(diff), _params(diff),
        _artifacts(diff), _tensors(diff), _blocks(diff), _scores(diff, levels=True), _missing(diff),
    ]  # fmt: skip
    return [part for part in parts if part.rows or part.notes]


def _verdicts(diff: dict[str, Any]) -> Section:
    rows = [
        (
            f"{row['study']}: {row['hypothesis']}",
            row["old"] or "–",
            row["new"] or "–",
            Quote(row["why"] or ""),
        )
        for row in diff["verdicts"]
    ]
    return Section("Verdicts that turned", ("hypothesis", *columns_of(diff), "why"), rows)


def _incomparable(diff: dict[str, Any]) -> Section:
    rows = [(row["kind"], Quote(row["because"]), _listed(row["of"])) for row in diff["incomparable"]]
    return Section("Not comparable, because", ("sort", "because", "of"), rows)


def _scores(diff: dict[str, Any], levels: bool) -> Section:
    chosen = [row for row in diff["scores"] if (row["difficulty"] != "all") == levels]
    rows = [_score(row) for row in chosen]
    columns = ("candidate", "measure", "verdict", *columns_of(diff), "change", "noise", "p")
    title = "Scores by level" if levels else "Scores"
    return Section(title, columns, rows, () if levels else _families(chosen), detail=levels)


def _score(row: dict[str, Any]) -> tuple[str, ...]:
    level = "" if row["difficulty"] == "all" else f" {row['difficulty']}"
    metric = row["metric"]
    values = [
        number(row[side], metric)
        + _between(*(number(row[f"{side}_{end}"], metric) for end in ("low", "high")))
        for side in ("old", "new")
    ]
    p = "" if row["p_corrected"] is None else p_value(row["p_corrected"])
    return (
        row["candidate"], f"{row['suite']}{level} {row['readout']} {row['label']}", worded(row), *values,
        _change(row), "" if row["noise"] is None else number(row["noise"], metric), p,
    )  # fmt: skip


def _between(low: str, high: str) -> str:
    return "" if "–" in (low, high) else f" ({low} to {high})"


def _change(row: dict[str, Any]) -> str:
    """Return a change with its interval: per cent of a perplexity, points of a share."""
    ends = [row["change_low"], row["change_high"]]
    if row["old"] is None or row["new"] is None:
        return ""
    if row["metric"] == "perplexity":
        unit, scale, middle = " %", 100.0, row["new"] / row["old"] - 1
        ends = [end if end is None else _expm1(end) for end in ends]
    else:
        unit, scale = (" points", 100.0) if row["metric"] in SHARES else ("", 1.0)
        middle = row["difference"]
    if None in ends:
        return f"{_signed(scale * middle)}{unit}"
    low, high = (_signed(scale * end) for end in ends)
    return f"{_signed(scale * middle)} ({low} to {high}){unit}"


def _expm1(value: float) -> float:
    return math.expm1(min(value, 50.0))


def _signed(value: float) -> str:
    text = f"{value:+.3g}"
    return "0" if float(text) == 0 else text.replace("-", MINUS)


def _families(scores: list[dict[str, Any]]) -> tuple[str, ...]:
    """Say over how many comparisons the verdicts' p-values are corrected; nothing without comparisons."""
    count = max((row["family"] or 0 for row in scores), default=0)
    if not count:
        return ()
    return (f"Verdicts: p <= 0.05 after Holm's correction over the {count:.0f} headline scores compared.",)


def _flipped(diff: dict[str, Any]) -> Section:
    counts = Counter((i["candidate"], i["suite"], i["readout"], i["became"]) for i in diff["flipped"])
    notes = tuple(
        f"{candidate} on {suite}, {readout}: {count} item(s) became {became}"
        for (candidate, suite, readout, became), count in counts.items()
    )
    rows = [
        (
            i["candidate"], f"{i['suite']} {i['readout']} {i['doc_id']}", Quote(i["prompt"] or "", True),
            *(_answer(i[name], i) for name in ("target", "response_old", "response_new")), i["became"],
        )
        for i in diff["flipped"]
    ]  # fmt: skip
    columns = ("candidate", "item", "question", "expected", *columns_of(diff), "became")
    return Section("Flipped items", columns, rows, notes, detail=True)


def _answer(text: str | None, item: dict[str, Any]) -> Quote:
    return Quote(answer_text(text, item["readout"], item["choices"]) or "")


def _params(diff: dict[str, Any]) -> Section:
    """Return params beside what they caused; of candidates, the steps that lead to each."""
    if diff["candidates"]:
        rows = [(p["candidate"], p["key"], *map(_value, (p["old"], p["new"]))) for p in diff["params"]]
        return Section("Recipes", ("candidate", "key", *columns_of(diff)), rows)
    caused = {row["cause"]: row for row in diff["causes"] if row["kind"] == "param"}
    rows = [
        (p["key"], _value(p["old"]), _value(p["new"]), _made_again(caused.get(p["key"])))
        for p in diff["params"]
    ]
    rows += [
        (f"{row['kind']} {row['cause']}", "", "changed", _made_again(row))
        for row in diff["causes"]
        if row["kind"] != "param"
    ]
    return Section("Params and what they caused", ("key", *columns_of(diff), "stages made again"), rows)


def _made_again(cause: dict[str, Any] | None) -> str:
    if cause is None:
        return ""
    parts = [_listed(cause["stages"])] if cause["stages"] else []
    if cause["then"]:
        parts.append(f"then {len(cause['then'])} after them")
    if cause["artifacts"]:
        parts.append(f"{len(cause['artifacts'])} output(s) differ")
    if cause["waiting"]:
        parts.append(f"not run yet: {_listed(cause['waiting'])}")
    return "; ".join(parts)


def _value(setting: Any) -> Quote | str:
    """Return the value of a param as a text."""
    return "–" if setting is None else Quote(str(setting))


def _listed(names: Sequence[str]) -> str:
    """Return names, the first few of them if they are many."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _artifacts(diff: dict[str, Any]) -> Section:
    rows = [
        (row["path"], row["change"], *map(_size, (row["old_bytes"], row["new_bytes"])))
        for row in diff["artifacts"]
    ]
    return Section("Artifacts", ("output", "change", *columns_of(diff)), rows, detail=True)


def _size(count: int | None) -> str:
    return "–" if count is None else size(count)


def _tensors(diff: dict[str, Any]) -> Section:
    columns = ("model", "tensors that differ", "change", "zeros gained", "zeros lost", "furthest")
    if not diff["tensors_compared"]:
        note = "Tensors were not compared; prunequant diff compares them unless --no-tensors is given."
        return Section("Tensors", columns, [], (note,))
    rows = []
    for row in diff["artifacts"]:
        if tensors := row.get("tensors"):
            names = [
                f"{len(tensors[key])} {key.replace('_', ' ')}, such as {tensors[key][0]}"
                for key in ("only_old", "only_new", "reshaped")
                if tensors[key]
            ]
            furthest = [
                f"{tensor['name']}: {_moved(tensor['change'])}, {tensor['share']:.1%} of values"
                for tensor in tensors["largest"][:NAMED]
            ]
            rows.append(
                (row["path"], f"{tensors['changed']} of {tensors['tensors']}", _moved(tensors["change"]),
                 f"{tensors['zeros_gained']:,}", f"{tensors['zeros_lost']:,}", "; ".join([*names, *furthest]))
            )  # fmt: skip
    notes = ("Change: the norm of the difference over that of the tensor before.",) if rows else ()
    return Section("Tensors", columns, rows, notes)


def _blocks(diff: dict[str, Any]) -> Section:
    """Return a row a block with a column a model."""
    models = {row["path"]: row["tensors"]["blocks"] for row in diff["artifacts"] if row.get("tensors")}
    models = {
        path: blocks for path, blocks in models.items() if any(block["change"] != 0 for block in blocks)
    }
    cells: dict[str, dict[str, str]] = {}
    for path, blocks in models.items():
        for block in blocks:
            zeros = f", zeros +{block['zeros_gained']:,} {MINUS}{block['zeros_lost']:,}"
            cells.setdefault(block["block"], {})[path] = _moved(block["change"]) + zeros
    rows = [(name, *(of.get(path, "–") for path in models)) for name, of in cells.items()]
    columns = ("block", *(path.removeprefix("data/models/") for path in models))
    return Section("Change by block", columns, rows, detail=True)


def _moved(change: float | None) -> str:
    return "–" if change is None else f"{100 * change:.3g} %"


def _missing(diff: dict[str, Any]) -> Section:
    rows, notes = [], []
    for gap in diff["missing"]:
        total = sum(out["bytes"] or 0 for out in gap["outputs"])
        rows += [(gap["revision"], out["path"], _size(out["bytes"])) for out in gap["outputs"]]
        notes.append(
            f"The cache lacks {len(gap['outputs'])} output(s) of {gap['revision']}, {size(total)}; what "
            "depends on them is left out."
        )
    commands = tuple(dict.fromkeys(command for gap in diff["missing"] for command in gap["commands"]))
    return Section(
        "Not in the cache", ("revision", "output", "size"), rows, tuple(notes), commands, detail=True
    )
