"""Brackets: settings that cannot be met are refused."""

import pytest

from stages.sources.graded.brackets import BracketsLevel


def test_more_kinds_than_brackets_are_refused():
    with pytest.raises(ValueError, match="3 kinds of bracket cannot occur among 2 brackets; lower kinds, or"):
        BracketsLevel(name="easy", depth=1, closed=1, kinds=3)
