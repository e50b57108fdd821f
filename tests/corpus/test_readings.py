"""Readings of answers: what each finds, what each ignores, and that nothing is never right."""

import pytest

from stages.corpus.readings import CHECKERS, READINGS, is_right, satisfies


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        ("words 3", ["one two three", "One, two; three."], ["one two", "one two three four", ""]),
        ("list 2", ["a b, c"], ["a, b, c", "a b", "a, ", ", a"]),
        ("starts b", ["Bird", "bird song"], ["a bird", "", ' "b'.strip()]),
        ("ends d", ["bird", "a BIRD."], ["birds", ""]),
        ("with bird", ["a Bird!", "bird"], ["birds", "abird", ""]),
        ("without bird", ["birds", "abird"], ["a BIRD", "bird."]),
        ("case upper", ["A BIRD", "A BIRD, 2"], ["A Bird", "a bird"]),
        ("case title", ["A Bird"], ["a bird", "A BIRD"]),
    ],
)
def test_each_constraint_has_its_checker(constraint, good, bad):
    assert constraint.split()[0] in CHECKERS
    assert [satisfies(text, constraint) for text in good] == [True] * len(good)
    assert [satisfies(text, constraint) for text in bad] == [False] * len(bad)


@pytest.mark.parametrize(
    ("reading", "answer", "good", "bad"),
    [
        ("number", "7", [" 7", "=> 7!", "7 or 8", "3 + 4 = 7"], ["", "70", "-7", "8 or 7", "7,000"]),
        ("word", "bavo", [" bavo", "Bavo.", '"bavo" and more'], ["", "a bavo", "bavos", "."]),
        ("words", "ash, elm", ["ash elm", "Ash, elm.", "ash, elm, x"], ["", "ash", "elm ash", "x ash elm"]),
        ("brackets", "] )", ["])", " ] )", "]) and", "] ) ."], ["", ")]", "])>", "] > )", "x ])"]),
    ],
)  # fmt: skip
def test_each_reading(reading, answer, good, bad):
    item = {"answer": answer}
    assert [is_right(reading, text, item) for text in good] == [True] * len(good)
    assert [is_right(reading, text, item) for text in bad] == [False] * len(bad)


@pytest.mark.parametrize("reading", READINGS)
def test_an_empty_response_is_never_right(reading):
    item = {"answer": "", "constraints": []}
    assert not is_right(reading, "", item) and not is_right(reading, " \n", item)
