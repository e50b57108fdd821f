"""Agreement of answers, against counts by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stages.core import tables
from stages.core.tables import Sample
from stages.reporting.agreement import agreement, choice_divergence, choice_entropy
from stages.reporting.collect import Results
from tests import results

LOGITS = hnp.arrays(float, 4, elements=st.floats(-50, 50))


@given(LOGITS, LOGITS)
def test_entropy_and_divergence_match_their_definitions(ours, base):
    q, p = ([math.exp(x) / math.fsum(map(math.exp, side)) for x in side] for side in (ours, base))
    slow = -math.fsum(x * math.log2(x) for x in p if x > 0)
    assert choice_entropy(base) == pytest.approx(slow, abs=1e-9)
    assert 0 <= choice_entropy(base) <= 2 + 1e-12
    slow = math.fsum(x * math.log2(x / y) for x, y in zip(p, q, strict=True) if x > 0)
    assert choice_divergence(ours, of=base) == pytest.approx(slow, rel=1e-6, abs=1e-9)
    assert choice_divergence(base, of=base) == 0


@given(LOGITS, st.floats(-1000, 1000))
def test_only_differences_of_likelihoods_matter(logits, shift):
    assert choice_entropy(logits + shift) == pytest.approx(choice_entropy(logits), abs=1e-6)
    assert choice_divergence(logits + shift, of=logits) == pytest.approx(0, abs=1e-6)


def _sample(i: int, metric: str, response: str, score: float, columns: dict) -> Sample:
    return Sample(
        task="t", readout="generation", metric=metric, doc_id=i, prompt_hash=str(i), response=response,
        score=score, generated_tokens=len(response), **columns,
    )  # fmt: skip


def answered(answers: dict[str, list[tuple[str, float]]], **columns: list) -> Results:
    """Return results of one suite from each item's response and score by candidate; `columns` by item."""
    scores = results.of_items(
        {name: [score for _, score in items] for name, items in answers.items()},
        readout="generation", metric="exact_match",
    ).scores  # fmt: skip
    samples = [
        tables.sample_table(name, "s", [_sample(i, metric, *item, {key: columns[key][i] for key in columns})])
        for name, items in answers.items()
        for metric in ("exact_match", "other")
        for i, item in enumerate(items)
    ]
    return Results(scores, pd.concat(samples, ignore_index=True))


ANSWERS = {
    "base/m": [("1", 1.0), ("2", 1.0), ("3", 0.0), ("4", 0.0)],
    "noise/again": [("1", 1.0), ("x", 0.0), ("3", 0.0), ("4", 0.0)],
    "prune/half": [("1", 1.0), ("yy", 0.0), ("33", 1.0), ("zz", 0.0)],
    "floor/dot": [(".", 0.0)] * 4,
}


def test_answers_are_counted_both_ways_and_beside_noise():
    (row,) = agreement(answered(ANSWERS)).to_dict("records")
    assert (row["candidate"], row["reference"], row["items"]) == ("prune/half", "base/m", 4)
    assert (row["same"], row["lost"], row["won"]) == (0.25, 1, 1)
    assert (row["noise_same"], row["noise_flips"]) == (0.75, 1)
    assert (row["reference_generated_tokens"], row["generated_tokens"]) == (1.0, 1.75)
    assert pd.isna(row["kl"]) and pd.isna(row["entropy"]) and pd.isna(row["budget"])


def test_a_candidate_without_its_base_has_no_row():
    assert agreement(answered({name: ANSWERS[name] for name in ANSWERS if name != "base/m"})).empty


def test_draws_are_paired_with_the_same_draw():
    (row,) = agreement(answered(ANSWERS, draw=[0, 1, 0, 1], budget=[8] * 4)).to_dict("records")
    assert row["items"] == 4 and row["budget"] == 8 and row["noise_flips"] == 1


def test_budgets_have_rows_and_noise_of_their_own():
    rows = agreement(answered(ANSWERS, budget=[8, 64, 64, None])).set_index("budget", drop=False)
    assert rows["items"].tolist() == [1, 2, 1]
    assert rows.loc[64, ["same", "lost", "won", "noise_same", "noise_flips"]].tolist() == [0, 1, 1, 0.5, 1]
    assert rows.loc[8, ["same", "noise_same", "noise_flips"]].tolist() == [1, 1, 0]
    assert rows[rows["budget"].isna()][["same", "noise_same"]].to_numpy().tolist() == [[0, 1]]


def test_choices_have_a_distribution():
    row = agreement(answered(ANSWERS, log_likelihoods=[[-1.0, -2.0]] * 4)).iloc[0]
    assert row["kl"] == 0 == row["noise_kl"]
    assert row["entropy"] == row["reference_entropy"] == pytest.approx(choice_entropy(np.array([-1.0, -2.0])))
