"""Labels and numbers as people read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.core.tables import MEASURE, SCORE_COLUMNS, table
from stages.reporting import words
from stages.reporting.collect import by_measure


def labels(*measures: dict) -> list[str]:
    shared = {"suite": "s", "task": "t", "readout": "likelihood"}
    scores = table(
        (shared | measure for measure in measures), {name: SCORE_COLUMNS[name] for name in MEASURE}
    )
    label = words.labels(scores)
    return [label[measure] for measure in by_measure(scores)]


@pytest.mark.parametrize(
    ("measures", "expected"),
    [
        ([{"metric": "acc"}], ["acc"]),
        ([{"metric": "acc", "filter": "strict"}], ["acc"]),
        (
            [{"metric": "acc", "filter": "strict"}, {"metric": "acc", "filter": "loose"}, {"metric": "f1"}],
            ["acc, strict", "acc, loose", "f1"],
        ),
        (
            [
                {"metric": "pass@4", "counted": "acc", "budget": 512},
                {"metric": "pass@4", "counted": "acc", "budget": 0},
                {"metric": "tokens", "budget": 512},
            ],
            ["pass@4, budget 512", "pass@4, budget 0", "tokens, budget 512"],
        ),
        (
            [
                {"metric": "pass@1", "counted": "acc", "budget": 8},
                {"metric": "pass@1", "counted": "f1", "budget": 8},
            ],
            ["pass@1 of acc, budget 8", "pass@1 of f1, budget 8"],
        ),
        (
            [{"metric": "acc"}, {"metric": "acc", "readout": "generation"}, {"metric": "acc", "task": "u"}],
            ["acc, likelihood, t", "acc, generation, t", "acc, likelihood, u"],
        ),
    ],
)  # fmt: skip
def test_labels_are_short_and_unique_in_their_suite(measures, expected):
    assert labels(*measures) == expected


PARTS = {
    "task": st.sampled_from(["t", "u"]), "readout": st.sampled_from(["likelihood", "generation"]),
    "metric": st.sampled_from(["acc", "f1"]), "counted": st.sampled_from([None, "acc", "f1"]),
    "filter": st.sampled_from([None, "strict"]), "budget": st.sampled_from([None, 0, 8]),
}  # fmt: skip


@given(
    st.lists(st.fixed_dictionaries(PARTS), min_size=1, max_size=6, unique_by=lambda m: frozenset(m.items()))
)
def test_labels_are_unique(measures):
    assert len(set(labels(*measures))) == len(measures)


@given(st.floats(-1e6, 1e6), st.sampled_from(["perplexity", "acc"]))
def test_numbers_are_right_within_half_a_last_digit(value, metric):
    text = words.number(value, metric).replace(words.MINUS, "-")
    digits = len(text.partition(".")[2])
    assert float(text.replace(",", "")) == pytest.approx(value, abs=0.5 * 10**-digits + 1e-9)
    assert text != "-0.000"


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("path:/home/someone/models/tiny", "path:tiny"),
        ("path:tiny", "path:tiny"),
        ("hub:org/name@revision", "hub:org/name@revision"),
    ],
)
def test_a_source_has_no_folders_of_this_machine(source, shown):
    assert words.source(source) == shown


def test_what_was_removed_is_weights_or_parameters_or_both():
    parts = [(0.5, 0.0, "50.0 %"), (0.0, 0.123, "12.3 % of parameters"), (0.5, None, "50.0 %")]
    parts += [(0.5, 0.25, "25.0 % of parameters, then 50.0 %"), (0.0, 0.0, "0.0 %")]
    for sparsity, removed, said in parts:
        assert words.removal({"sparsity": sparsity, "parameters_removed": removed}) == said
