"""The items of the page: every question once, with what the base and each candidate answered.

They stand in columns, each text once, packed (`stages.reporting.page.packing`). Where that takes more than
`_MOST`, the page keeps all items that some candidate flipped and a sample of the rest, and says so; beyond
that texts are cut, and at last flipped items are sampled too. An ellipsis stands where a text lacks its
beginning.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from stages.core.tables import ITEM, MEASURE
from stages.reporting.collect import Measure, Results, by_measure, records
from stages.reporting.comparison import PER_ITEM
from stages.reporting.page.packing import as_json, zipped
from stages.reporting.words import answer_text

_MOST = 3_000_000
"""The most characters that packed items take."""


@dataclass(frozen=True)
class _Thrift:
    """What is kept: the shares of items that nobody flipped and of flipped ones, and characters of a text."""

    rest: float = 1.0
    flipped: float = 1.0
    characters: int = 4000
    likelihoods: bool = True


_THRIFT = (
    _Thrift(), _Thrift(rest=0.3), _Thrift(rest=0.1), _Thrift(rest=0.02), _Thrift(rest=0.02, characters=1000),
    _Thrift(rest=0.0, characters=600), _Thrift(rest=0.0, characters=300, likelihoods=False),
    *(_Thrift(0.0, share, 300, likelihoods=False) for share in (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001, 0.0)),
)  # fmt: skip
"""From all to nothing; the first that fits is used."""


def browse(
    results: Results, measures: Sequence[Measure], candidates: Sequence[str], references: dict[str, str],
    limit: int = _MOST,
) -> tuple[str, str]:  # fmt: skip
    """Return the packed items and a sentence on what is left out, empty where nothing is.

    Args:
        measures: the headline measures, in the order of the table's columns.
        candidates: those of the table.
        references: the candidate that each is compared with.
    """
    tables = [
        _table(results, place, measure, candidates, references) for place, measure in enumerate(measures)
    ]
    for thrift in _THRIFT:
        columns, cut = _columns(tables, thrift)
        text = zipped(as_json(columns))
        if len(text) <= limit:
            return text, _sentence(tables, thrift, cut)
    raise ValueError("the page's items do not fit even without any")


def _table(
    results: Results, place: int, measure: Measure, candidates: Sequence[str], references: dict[str, str]
) -> dict[str, Any]:
    """Return the questions of a measure and every candidate's answers, by question."""
    named = dict(zip(MEASURE, measure, strict=True))
    metric = PER_ITEM.get(named["metric"], named["metric"])
    samples = results.samples[
        results.samples["suite"].eq(named["suite"]) & results.samples["candidate"].isin(candidates)
    ]
    wanted = tuple({**named, "metric": metric}.values())
    rows = by_measure(samples).get(wanted, samples.head(0))
    scores, draws = rows[rows["draw"].isna()], rows[rows["draw"].notna()]
    asked = results.items[results.items["suite"] == named["suite"]]
    questions = scores.drop_duplicates(["doc_id", "prompt_hash"])[[*ITEM, "difficulty", "target"]]
    joined = questions.merge(
        asked[[*ITEM, "prompt", "prompt_characters", "choices"]], on=list(ITEM), how="left"
    )
    answers: dict[str, dict[tuple[Any, str], dict[str, Any]]] = {}
    for source in (draws.drop_duplicates(["candidate", "doc_id", "prompt_hash"]), scores):
        for row in records(source):
            at = answers.setdefault(row["candidate"], {})
            key = (row["doc_id"], row["prompt_hash"])
            first = at.get(key, {})
            at[key] = row | {
                "response": row["response"] if row["response"] is not None else first.get("response")
            }
    entries = records(joined)
    for entry in entries:
        if entry["prompt"] is not None and (entry["prompt_characters"] or 0) > len(entry["prompt"]):
            entry["prompt"] = f"…{entry['prompt']}"  # what the evaluation kept of it
        key = (entry["doc_id"], entry["prompt_hash"])
        entry["answers"] = {name: at[key] for name, at in answers.items() if key in at}
        shown = partial(answer_text, readout=named["readout"], choices=entry["choices"])
        entry["target"] = shown(entry["target"])
        for answer in entry["answers"].values():
            answer["response"] = shown(answer["response"])
        entry["flipped"] = any(
            name in references
            and references[name] in entry["answers"]
            and answer["score"] != entry["answers"][references[name]]["score"]
            for name, answer in entry["answers"].items()
        )
        digest = hashlib.sha256(f"{named['suite']} {key}".encode()).digest()
        entry["draw"] = int.from_bytes(digest[:4], "big") / 2**32
    return {"place": place, "entries": entries, "numeric": metric != named["metric"]}


def _kept(table: dict[str, Any], thrift: _Thrift) -> list[dict[str, Any]]:
    # Of a text's windows every one changes a little; none is right or wrong.
    return [
        entry
        for entry in table["entries"]
        if entry["draw"] < (thrift.flipped if entry["flipped"] and not table["numeric"] else thrift.rest)
    ]


def _columns(tables: Sequence[dict[str, Any]], thrift: _Thrift) -> tuple[dict[str, Any], int]:
    """Return the items in columns, and how many texts are cut."""
    texts: dict[str, int] = {}
    cut: set[str] = set()

    def place_of(text: str | None) -> int:
        if text is None:
            return -1
        if len(text) > thrift.characters:
            text = f"…{text[-thrift.characters :]}"
            cut.add(text)
        return texts.setdefault(text, len(texts))

    measures = []
    for table in tables:
        entries = _kept(table, thrift)
        names = list(dict.fromkeys(name for entry in entries for name in entry["answers"]))
        columns = {}
        for name in names:
            given = [entry["answers"].get(name) for entry in entries]
            columns[name] = {
                "response": [place_of(answer and answer["response"]) for answer in given],
                "score": [answer and _rounded(answer["score"]) for answer in given],
                "likelihoods": [
                    answer and answer["log_likelihoods"] and [round(x, 2) for x in answer["log_likelihoods"]]
                    for answer in given
                ]
                if thrift.likelihoods
                else None,
            }
        measures.append(
            {
                "measure": table["place"],
                "numeric": table["numeric"],
                "item": [entry["doc_id"] for entry in entries],
                "level": [place_of(entry["difficulty"]) for entry in entries],
                "prompt": [place_of(entry["prompt"]) for entry in entries],
                "target": [place_of(entry["target"]) for entry in entries],
                "choices": [
                    entry["choices"] and [place_of(choice) for choice in entry["choices"]]
                    for entry in entries
                ],
                "answers": columns,
            }
        )
    return {"texts": list(texts), "measures": measures}, len(cut)


def _rounded(score: float | None) -> float | int | None:
    if score is None or not math.isfinite(score):
        return None
    return int(score) if score == int(score) else round(score, 4)


def _sentence(tables: Sequence[dict[str, Any]], thrift: _Thrift, cut: int) -> str:
    """Say what the page lacks, empty where it has all."""
    shortened = (
        f"{cut:,} long text{'s have' if cut > 1 else ' has'} an ellipsis (…) in place of all but the last "
        f"{thrift.characters:,} characters."
        if cut
        else ""
    )
    if thrift == _Thrift():
        return shortened
    count = sum(len(table["entries"]) for table in tables)
    kept = sum(len(_kept(table, thrift)) for table in tables)
    flipped = (
        "all items that a candidate flipped"
        if thrift.flipped == 1
        else f"{thrift.flipped:.1%} of the flipped items"
    )
    without = "" if thrift.likelihoods else ", no likelihoods"
    return (
        f"The page has {kept:,} of {count:,} items: {flipped} and {thrift.rest:.0%} of the others, drawn by "
        f"hash{without}. samples.parquet and items.parquet have all. {shortened}".rstrip()
    )


def references_of(rows: pd.DataFrame) -> dict[str, str]:
    """Return the candidate that each one is compared with."""
    known = rows.dropna(subset=["reference"]).drop_duplicates("candidate")
    return dict(zip(known["candidate"].astype(str), known["reference"].astype(str), strict=True))
