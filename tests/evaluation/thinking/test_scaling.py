"""A sweep of budgets and draws: the rows it writes, and the tasks it refuses."""

import itertools

import pytest

from stages.core.errors import Refusal
from stages.core.tables import MEASURE
from tests.pipeline import do, download, params
from tests.scoring import changed, scored
from tests.stock import mirrored
from tests.thinking import RULES


def test_a_sweep_of_budgets_is_tidy(workspace):
    rules = RULES | {"budgets": [0, 6], "draws": 2, "waits": 1}
    chosen = params("llama", {})
    graded = {"arithmetic": {"shots": 1, "batch_size": 3, "thinking": rules}}
    chosen = changed(chosen, suites={"perplexity": {}, "graded": graded, "benchmark": {}})
    do(chosen)
    download(chosen, "datasets/arithmetic")
    scores, samples = scored(chosen, "base/tiny", "arithmetic")

    whole = scores[scores.difficulty == "all"].set_index(["budget", "metric"])
    counting, of_thinking = ["pass@1", "pass@2", "maj@2"], ["tokens", "ended", "repetition", "self_bleu"]
    assert whole.loc[6].index.tolist() == counting + of_thinking
    assert whole.loc[0].index.tolist() == [*counting, "tokens"]
    for table in (scores, samples):
        counts = table.metric.isin([*counting, "draw"])
        assert (table.counted[counts] == "exact_match").all() and table.counted[~counts].isna().all()
        assert table["filter"].isna().all()
    assert (scores.draws == 2).all() and (scores.temperature == 1).all() and set(scores.budget) == {0, 6}
    assert not scores.duplicated([*MEASURE, "difficulty"]).any()
    for budget in (0, 6):
        of_budget = samples[samples.budget == budget]
        draws = of_budget[of_budget.metric == "draw"]
        assert sorted(zip(draws.doc_id, draws.draw, strict=True)) == list(
            itertools.product(range(4), range(2))
        )
        assert (draws.thinking.str.len() > 0).any() == (budget > 0)
        by_item = draws.groupby("doc_id")
        for metric, expected in (
            ("tokens", by_item.generated_tokens.mean()),
            ("pass@1", by_item.score.mean()),
            ("pass@2", by_item.score.max()),
        ):
            rows = of_budget[of_budget.metric == metric].set_index("doc_id")
            assert rows.score.to_dict() == pytest.approx(expected.to_dict())
            assert whole.value[budget, metric] == pytest.approx(expected.mean())
        assert draws.draw.notna().all()
    assert samples[samples.metric != "draw"].draw.isna().all()


def test_a_stock_task_is_counted_filter_by_filter(workspace, few_stock_tasks):
    chosen = mirrored(
        "gsm8k", {"shots": 1, "max_gen_toks": 8, "thinking": RULES | {"budgets": [4], "draws": 2}}
    )
    scores, samples = scored(chosen, "base/tiny", "gsm8k")
    counting = scores[scores.counted == "exact_match"]
    assert sorted(zip(counting["filter"], counting.metric, strict=True)) == [
        (answer_filter, metric)
        for answer_filter in ("flexible-extract", "strict-match")
        for metric in ("maj@2", "pass@1", "pass@2")
    ]
    assert scores["filter"][scores.counted.isna()].isna().all()
    rows = samples[(samples.metric == "pass@1") & (samples["filter"] == "strict-match")]
    assert len(rows) == 3 and (samples.metric == "draw").sum() == 2 * 2 * 3


def test_a_task_of_choices_is_not_thought_about(workspace, few_stock_tasks):
    chosen = mirrored("arc_easy", {"thinking": RULES | {"budgets": [4]}})
    with pytest.raises(Refusal, match=r"arc_easy is answered by likelihood, .* leave thinking out"):
        scored(chosen, "base/tiny", "arc-easy")
