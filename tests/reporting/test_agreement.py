"""How alike answers are, against the same counted by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stages.core import tables
from stages.reporting.agreement import agreement, divergence, entropy
from stages.reporting.collect import Results

LOGITS = hnp.arrays(float, 4, elements=st.floats(-50, 50))


@given(LOGITS, LOGITS)
def test_entropy_and_divergence_are_the_slow_ones(one, other):
    p, q = ([math.exp(x) / math.fsum(map(math.exp, side)) for x in side] for side in (one, other))
    slow = -math.fsum(x * math.log2(x) for x in p if x > 0)
    assert entropy(one) == pytest.approx(slow, abs=1e-9)
    assert 0 <= entropy(one) <= 2 + 1e-12
    slow = math.fsum(x * math.log2(x / y) for x, y in zip(p, q, strict=True) if x > 0)
    assert divergence(other, of=one) == pytest.approx(slow, rel=1e-6, abs=1e-9)
    assert divergence(one, of=one) == 0


@given(LOGITS, st.floats(-1000, 1000))
def test_likelihoods_are_read_beside_each_other_only(logits, shift):
    assert entropy(logits + shift) == pytest.approx(entropy(logits), abs=1e-6)
    assert divergence(logits + shift, of=logits) == pytest.approx(0, abs=1e-6)


def made(answers: dict[str, list[tuple[str, float]]], lineages: dict[str, str], **columns: list) -> Results:
    """Results of one suite: by candidate, each item's response and score."""
    scores = [
        {"candidate": name, "base": "tiny", "lineage": line, "suite": "s", "task": "s",
         "readout": "generation", "metric": "exact_match", "difficulty": "all", "value": 0.0}
        for name, line in lineages.items()
    ]  # fmt: skip
    samples = [
        {"candidate": name, "suite": "s", "task": "s", "readout": "generation", "metric": metric, "doc_id": i,
         "prompt_hash": str(i), "response": response, "score": score, "generated_tokens": len(response)}
        | {column: values[i] for column, values in columns.items()}
        for name, found in answers.items()
        for metric in ("exact_match", "other")
        for i, (response, score) in enumerate(found)
    ]  # fmt: skip
    return Results(tables.table(scores, tables.SCORE_COLUMNS), tables.table(samples, tables.SAMPLE_COLUMNS))


LINEAGES = {
    "base/tiny": "base/tiny",
    "noise/again": "base/tiny > noise/again",
    "prune/half": "base/tiny > prune/half",
    "floor/dot": "floor/dot",
}
ANSWERS = {
    "base/tiny": [("1", 1.0), ("2", 1.0), ("3", 0.0), ("4", 0.0)],
    "noise/again": [("1", 1.0), ("x", 0.0), ("3", 0.0), ("4", 0.0)],
    "prune/half": [("1", 1.0), ("yy", 0.0), ("33", 1.0), ("zz", 0.0)],
    "floor/dot": [(".", 0.0)] * 4,
}


def test_answers_are_counted_both_ways_and_beside_noise():
    (row,) = agreement(made(ANSWERS, LINEAGES)).to_dict("records")
    assert (row["candidate"], row["reference"], row["items"]) == ("prune/half", "base/tiny", 4)
    assert (row["same"], row["lost"], row["won"]) == (0.25, 1, 1)
    assert (row["noise_same"], row["noise_flips"]) == (0.75, 1)
    assert (row["reference_generated_tokens"], row["generated_tokens"]) == (1.0, 1.75)
    assert pd.isna(row["kl"]) and pd.isna(row["entropy"]) and pd.isna(row["budget"])


def test_a_candidate_without_its_base_has_no_row():
    answers = {name: found for name, found in ANSWERS.items() if name != "base/tiny"}
    lineages = {name: line for name, line in LINEAGES.items() if name != "base/tiny"}
    assert agreement(made(answers, lineages)).empty


def test_draws_are_paired_with_the_same_draw():
    results = made(ANSWERS, LINEAGES, draw=[0, 1, 0, 1], budget=[8] * 4)
    (row,) = agreement(results).to_dict("records")
    assert row["items"] == 4 and row["budget"] == 8 and row["noise_flips"] == 1


def test_choices_have_a_distribution():
    results = made(ANSWERS, LINEAGES, log_likelihoods=[np.array([-1.0, -2.0])] * 4)
    (row,) = agreement(results).to_dict("records")
    assert row["kl"] == 0 == row["noise_kl"]
    assert row["entropy"] == row["reference_entropy"] == pytest.approx(entropy(np.array([-1.0, -2.0])))
