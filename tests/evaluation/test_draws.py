"""Metrics over draws, against counting all subsets and against examples."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.evaluation.draws import majority, pass_at_k, repetition, self_bleu


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_draw(draws, data):
    k = data.draw(st.integers(1, len(draws)))
    subsets = list(itertools.combinations(draws, k))
    assert pass_at_k(len(draws), sum(draws), k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_without_bias():
    p, n, k = 0.3, 6, 3
    expected = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert expected == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize(
    ("votes", "right_ones", "expected"),
    [
        (["7", "8", "7"], [1, 0, 1], 1.0),
        (["7", "8", "8"], [1, 0, 0], 0.0),
        (["7", "8"], [1, 0], 0.5),
        (["", "", "7"], [0, 0, 1], 1.0),
        (["", ""], [0, 0], 0.0),
        (["1", "2", "3"], [0, 0, 1], 1 / 3),
    ],
)
def test_majorities(votes, right_ones, expected):
    assert majority(votes, right_ones) == pytest.approx(expected)


def test_repetition_is_the_share_of_runs_seen_before():
    assert repetition("a b c d") == 0
    assert repetition("a b c") == 0 == repetition("")
    assert repetition("a b c d a b c d") == pytest.approx(1 - 4 / 5)
    assert repetition("a " * 100) == pytest.approx(1 - 1 / 97)


def test_self_bleu_tells_identical_from_different_texts():
    text = "the cat sat on the mat and slept"
    assert self_bleu([text] * 3) == pytest.approx(1)
    assert self_bleu([text, "one two three four five", "six seven eight nine ten"]) < 0.1
    assert self_bleu(["", ""]) == 0
