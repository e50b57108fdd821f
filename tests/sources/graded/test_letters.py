"""Letters: each count is equally frequent; letters stand alone or in words."""

import pytest

from stages.sources.graded.letters import LettersLevel
from tests.graded import dataset, write


def test_each_count_is_equally_frequent(tmp_path):
    rows = write(dataset("letters", test=20, train=0), tmp_path)["test"]
    for (_, level), numbers in zip(rows.groupby("difficulty"), ("1248", "0123"), strict=True):
        counts = level["answer"].value_counts()
        assert set(counts.index) == set(numbers) and counts.max() - counts.min() <= 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "letters are counted alone or in words; give either others or length"),
        ({"others": 1, "length": 5}, "letters are counted alone or in words; give either others or length"),
        ({"others": 1, "words": 2}, "2 words need a length; others is for single letters"),
    ],
)
def test_letters_stand_alone_or_in_words(settings, message):
    with pytest.raises(ValueError, match=message):
        LettersLevel(name="easy", **settings)
