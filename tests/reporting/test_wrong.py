"""The class of a wrong answer, and their numbers by candidate."""

import pytest

from stages.reporting.wrong import CLASSES, class_of, wrong_answers
from tests.results import of_items


@pytest.mark.parametrize(
    ("response", "target", "cut", "expected"),
    [
        ("I do not know", "45", False, "no answer"),
        ("", "lion", False, "no answer"),
        ("46", "45", False, "off by a digit"),
        ("4", "45", False, "other"),
        ("-45", "45", False, "other"),
        ("the answer is 95 and 95", "45", True, "off by a digit"),
        ("7 7 7 7", "45", True, "repeats"),
        ("so we add so we add so we add", "lion", False, "repeats"),
        ("100 and then we", "45", True, "cut"),
        ("tiger", "lion", False, "other"),
    ],
)
def test_the_first_class_that_fits(response, target, cut, expected):
    assert class_of({"response": response, "target": target, "cut": cut}) == expected


def test_wrong_answers_are_counted_by_candidate():
    table = of_items(
        {"base/m": [1.0, 0.0, 0.0], "prune/p": [0.0, 0.0, 1.0]}, readout="generation", metric="exact_match"
    )
    samples = table.samples.assign(target="12", response=["12", "13", "x", "x", "999", "12"])
    rows = wrong_answers(samples).set_index("candidate")
    assert rows.loc["base/m", [*CLASSES]].tolist() == [1, 1, 0, 0, 0]
    assert rows.loc["prune/p", [*CLASSES]].tolist() == [1, 0, 0, 0, 1]
    assert rows["wrong"].tolist() == [2, 2] and rows["answers"].tolist() == [3, 3]
    assert wrong_answers(samples.assign(score=0.5)).empty  # partial scores are neither
    assert wrong_answers(samples.assign(readout="likelihood")).empty
