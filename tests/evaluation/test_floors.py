"""Floors: the best scores of responders without knowledge, on the same items and prompts."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from lm_eval.api.task import ConfigurableTask

from stages.controls.responders import RESPONDERS, SPEAKERS
from stages.core.tables import Score
from stages.corpus.readings import is_right
from stages.evaluation.floors import with_floors
from stages.evaluation.null import NullLM
from stages.evaluation.suite import SuiteRows
from tests import families
from tests.pipeline import do, download, params
from tests.scoring import changed, scored


def test_floors_of_graded_scores_are_the_best_that_null_responders_get(workspace):
    chosen = params(
        "llama", {f"floor/{name}": {"source": "base/tiny", "responder": name} for name in RESPONDERS}
    )
    chosen = changed(chosen, suites=json.loads(chosen.suites.model_dump_json()) | {"perplexity": {}})
    do(chosen)
    download(chosen, "datasets/arithmetic")
    tables = {name: scored(chosen, f"floor/{name}", "arithmetic") for name in RESPONDERS}
    model, _ = scored(chosen, "base/tiny", "arithmetic")
    test = pd.read_parquet("data/datasets/arithmetic/test.parquet")
    reading = json.loads(Path("data/datasets/arithmetic/dataset.json").read_text())["answer"]["reading"]
    for _, samples in tables.values():  # a score is that of the response
        for row in samples[samples.readout == "generation"].itertuples():
            assert row.score == is_right(reading, row.response, test.iloc[row.doc_id].to_dict())
    for row in model[model.readout == "generation"].itertuples():
        best = max(
            scores[(scores.readout == "generation") & (scores.difficulty == row.difficulty)].value.item()
            for scores, _ in tables.values()
        )
        assert row.floor == best
    for row in model[model.readout == "likelihood"].itertuples():
        assert row.floor >= 1 / 4


def score_row(value: float, floor: float | None, higher_is_better: bool, **columns: Any) -> Score:
    return Score(
        task="t", task_version="1", shots=0, readout="likelihood", metric="acc", value=value, floor=floor,
        stderr=0.05, num_items=9, higher_is_better=higher_is_better, seed=0, **columns,
    )  # fmt: skip


def floor_of(chance: float | None, nulls: list[float], higher_is_better: bool) -> float | None:
    """The floor of a score of 0.9 where the responders, in order, score `nulls`."""
    values = iter([0.9, *nulls])
    scores, _ = with_floors(
        NullLM.named("empty", families.tokenizer(), 0),
        0,
        lambda lm: ([score_row(next(values), chance, higher_is_better)], []),
    )
    assert scores[0].value == 0.9
    return scores[0].floor


@pytest.mark.parametrize(
    ("chance", "nulls", "higher_is_better", "floor"),
    [
        (0.25, [0.30, 0.28], True, 0.25),  # no further above chance than luck takes it
        (0.25, [0.30, 0.60], True, 0.60),
        (None, [0.10, 0.15], True, 0.15),
        (None, [9.0, 8.0], False, None),  # a perplexity has no floor
    ],
)
def test_a_floor_is_above_chance_only_beyond_luck(chance, nulls, higher_is_better, floor):
    assert floor_of(chance, nulls, higher_is_better) == floor


@pytest.mark.parametrize("column", ["filter", "budget", "counted", "difficulty"])
def test_scores_that_differ_in_one_column_have_floors_of_their_own(column):
    others = {"budget": (1, 2)}.get(column, ("a", "b"))
    values = iter([(0.9, 0.9), (0.1, 0.2), (0.4, 0.3)])

    def ask(lm: Any) -> SuiteRows:
        rows = [
            score_row(value, None, True, **{column: other})
            for other, value in zip(others, next(values), strict=True)
        ]
        whole = [score_row(1, None, True)] if column == "difficulty" else []
        return [*whole, *rows], []

    scores, _ = with_floors(NullLM.named("empty", families.tokenizer(), 0), 0, ask)
    assert [row.floor for row in scores][-2:] == [0.4, 0.3]


def test_responders_get_the_requests_of_the_model_and_prompts_are_built_once(workspace, monkeypatch):
    chosen = params("llama", {})
    do(chosen)
    download(chosen, "datasets/arithmetic")
    suite, tokenizer = chosen.suites.graded["arithmetic"], families.tokenizer()
    built, calls = [], []
    context = ConfigurableTask.fewshot_context
    monkeypatch.setattr(
        ConfigurableTask,
        "fewshot_context",
        lambda self, doc, *args, **options: built.append(doc) or context(self, doc, *args, **options),
    )
    for kind in ("loglikelihood", "generate_until"):
        answer = getattr(NullLM, kind)

        def record(self, requests, kind=kind, answer=answer):
            assert all(not request.filtered_resps for request in requests)
            calls.append((kind, [request.args for request in requests]))
            return answer(self, requests)

        monkeypatch.setattr(NullLM, kind, record)
    _, samples = suite.evaluate(NullLM.named("echo", tokenizer, 0), "arithmetic", 0)
    assert len(built) == len(samples)
    assert len(calls) == 2 * (1 + len(SPEAKERS))
    for kind in ("loglikelihood", "generate_until"):
        first, *others = [requests for called, requests in calls if called == kind]
        assert all(other == first for other in others)
