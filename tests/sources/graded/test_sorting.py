"""Sorting: how many letters the two most similar words share."""

from hypothesis import given
from hypothesis import strategies as st

from stages.sources.graded.sorting import shared_letters


@given(st.lists(st.text("abcd", min_size=1, max_size=4), min_size=2, max_size=6))
def test_the_longest_shared_prefix(words):
    slow = max(
        max(n for n in range(5) if word[:n] == other[:n] and n <= min(len(word), len(other)))
        for place, word in enumerate(words)
        for other in words[place + 1 :]
    )
    assert shared_letters(words) == slow
