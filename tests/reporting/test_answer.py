"""What to ship: from the words of scores, and never `same` where that is not shown."""

import math
import re

import pytest

from stages.reporting import words
from stages.reporting.collect import Results
from stages.reporting.page.answer import MARGINS, Recommendations
from tests import results
from tests.results import compared, of_items, together


def answers(table, sizes, margin=0.02, noise=None):
    """Return the answers for candidates of the base `m`, whose sizes are in bytes."""
    rows = table.scores["candidate"].map(sizes)
    table.scores["bytes_on_disk"], table.scores["bytes_ideal"] = rows, rows
    comparison = compared(table, margin=margin, noise=noise or {})
    return Recommendations(comparison, words.labels(comparison.rows), margin, noise)


def lines_of(advice, **settings):
    """Return an answer as {head: (candidate, text)}."""
    return {
        line.head: (line.candidate, line.text)
        for line in advice.of("base/m", settings.pop("margin", 0.02), **settings)
    }


def losing(count, of=1000):
    return [0.0] * count + [1.0] * (of - count)


SIZES = {"base/m": 100, "quantize/close": 60, "quantize/small": 40, "prune/bad": 50}


@pytest.fixture(scope="module")
def advice():
    # Of 1000 items `close` loses 2, `small` 60 and `bad` 500.
    items = {
        "base/m": losing(0),
        "quantize/close": losing(2),
        "quantize/small": losing(60),
        "prune/bad": losing(500),
    }
    return answers(of_items(items), SIZES)


def test_it_ships_the_smallest_that_is_surely_within_the_margin(advice):
    assert lines_of(advice)["Ship"] == (
        "quantize/close", "40 % smaller (0.1 kB on disk), same within 2 % on the one score.",
    )  # fmt: skip
    assert lines_of(advice)["Smallest acceptable"][0] == "quantize/close"
    wide = lines_of(advice, margin=0.1)  # 6 points are surely a loss, and surely less than ten
    assert wide["Ship"][0] == "quantize/small"
    assert wide["Ship"][1].endswith("no loss beyond 10 % on the one score (1 slightly worse).")


def test_it_avoids_what_a_model_no_larger_beats(advice):
    assert lines_of(advice)["Avoid"] == (None, "bad (small is no larger and scores no worse).")


def avoided(advice, **settings):
    return lines_of(advice, **settings).get("Avoid", (None, ""))[1]


@pytest.mark.parametrize(("lost", "word"), [(600, "lost more than half on s (acc)"), (300, "")])
def test_it_avoids_the_smallest_model_too_where_it_lost_more_than_half(lost, word):
    items = {"base/m": losing(0), "quantize/close": losing(2), "quantize/small": losing(lost)}
    assert avoided(answers(of_items(items), SIZES)) == (f"small (surely {word})." if word else "")


def test_half_is_that_of_the_points_above_the_floor():
    items = {"base/m": losing(200), "quantize/small": losing(550)}  # 0.8 and 0.45
    table = of_items(items)
    assert avoided(answers(table, SIZES)) == ""
    table.scores["floor"] = 0.25
    assert avoided(answers(table, SIZES)) == "small (surely lost more than half on s (acc))."


@pytest.mark.parametrize(("loss", "said"), [(0.8, True), (0.6, False)])
def test_a_perplexity_lost_half_where_it_surely_doubled(loss, said):
    nats = [3.0 + 0.01 * (i % 7) for i in range(50)]
    worse = [x + loss + 0.001 * (i % 3) for i, x in enumerate(nats)]
    table = of_items({"base/m": nats, "quantize/small": worse}, metric="perplexity")
    assert bool(avoided(answers(table, SIZES))) == said


def test_it_avoids_a_model_that_no_graded_score_tells_from_guessing():
    items = {"base/m": losing(50, 100), "quantize/small": losing(67, 100)}  # 0.5 and 0.33
    table = of_items(items)
    table.scores["floor"] = 0.25
    assert avoided(answers(table, SIZES)) == "small (not clearly above the floor on any score)."
    other = of_items(dict.fromkeys(items, losing(50, 100)), readout="generation")
    other.scores["floor"] = 0.25
    assert avoided(answers(together(table, other), SIZES)) == ""


def test_a_base_that_guesses_condemns_nobody():
    table = of_items({"base/m": losing(700), "quantize/small": losing(760)})  # 0.3 and 0.24
    table.scores["floor"] = 0.3
    assert lines_of(answers(table, SIZES))["Smallest acceptable"][0] is None
    assert avoided(answers(table, SIZES)) == ""


def test_none_is_preferred_that_is_to_be_avoided_itself():
    items = {"base/m": losing(0), "quantize/small": losing(600), "prune/bad": losing(700)}
    assert avoided(answers(of_items(items), SIZES)) == "small, bad (surely lost more than half on s (acc))."


def test_no_model_is_to_be_shipped_and_avoided(whole):
    wanted, folder = whole
    read = results.read(wanted, folder / "data/results")
    comparison = compared(read)
    advice = Recommendations(comparison, words.labels(comparison.rows), 0.02)
    kinds = set()
    for lines in advice.controls()["texts"]:
        said = {head: (candidate, text) for head, candidate, text in lines}
        why = r"\((?:[^()]|\([^()]*\))*\)"
        names = re.findall(r"[\w-]+", re.sub(why, "", said.pop("Avoid", (None, ""))[1]))
        kinds |= set(said)
        assert not {words.short(name) for name, _ in said.values() if name} & set(names)
    assert {"Ship", "Smallest acceptable"} <= kinds


def test_a_budget_leaves_larger_models_out(advice):
    tight = lines_of(advice, budget=45)
    assert tight["Ship none yet"][1].startswith(
        "no smaller model of at most 0.0 kB on disk is shown to be the same"
    )
    assert tight["Smallest acceptable"][0] is None and "small loses least" in tight["Smallest acceptable"][1]
    assert list(lines_of(advice, budget=10)) == ["Nothing to ship"]


def test_few_items_are_never_called_the_same():
    few = answers(of_items({"base/m": losing(0, 20), "quantize/close": losing(1, 20)}), SIZES)
    lines = lines_of(few)
    assert list(lines) == ["Ship none yet", "Smallest acceptable"]
    assert "1 of 1 not shown the same: s (acc) not settled" in lines["Smallest acceptable"][1]


def test_every_score_counts():
    table = together(
        of_items({"base/m": losing(0), "quantize/close": losing(2)}),
        of_items(
            {"base/m": losing(0), "quantize/close": losing(500)}, readout="generation", metric="exact_match"
        ),
    )
    lines = lines_of(answers(table, SIZES))
    assert "Ship" not in lines and lines["Smallest acceptable"][0] is None


def test_a_perplexity_counts_in_per_cent():
    nats = [3.0 + 0.01 * (i % 7) for i in range(50)]
    table = of_items(
        {"base/m": nats, "quantize/close": [x + 0.01 + 0.001 * (i % 3) for i, x in enumerate(nats)]},
        metric="perplexity",
    )
    advice = answers(table, SIZES)
    assert lines_of(advice)["Ship"][0] == "quantize/close"
    assert "Ship" not in lines_of(advice, margin=0.005)


def test_words_of_another_margin_are_those_of_a_report_with_it(whole):
    wanted, folder = whole
    read = results.read(wanted, folder / "data/results")
    comparison = compared(read)
    for margin in (0.02, 0.2):
        ours = comparison.at_margin(margin)
        theirs = compared(read, margin=margin).rows.loc[ours.index]
        assert ours["verdict"].tolist() == theirs["verdict"].tolist()
        assert ours["p_same"].notna().any()  # the base's own is missing
        assert ours["p_same"].tolist() == pytest.approx(
            theirs["p_same"].tolist(), rel=1e-6, abs=1e-12, nan_ok=True
        )


def test_controls_hold_every_answer(advice):
    controls = advice.controls()
    assert set(advice.margins) == set(MARGINS)
    assert advice.budgets["bytes_on_disk"] == [100_000.0]  # all are smaller
    for kind, by_margin in controls["answers"]["base/m"].items():
        for margin, places in zip(advice.margins, by_margin, strict=True):
            for budget, place in zip((*advice.budgets[kind], math.inf), places, strict=True):
                lines = advice.of("base/m", margin, kind, budget)
                assert controls["texts"][place] == [[x.head, x.candidate, x.text] for x in lines]


def test_without_a_base_there_is_no_answer():
    assert answers(of_items({"quantize/close": losing(2)}), SIZES).references == []


def test_budgets_are_tenths_of_a_megabyte_each_once():
    items = {"base/m": losing(0)} | {f"quantize/{name}": losing(2) for name in "abc"}
    sizes = {"base/m": 200e6, "quantize/a": 99_760_000, "quantize/b": 99_790_000, "quantize/c": 99_810_000}
    advice = answers(of_items(items), sizes)
    assert advice.budgets["bytes_on_disk"] == [99_800_000, 99_900_000]
    assert lines_of(advice, budget=99_800_000)["Ship"][0] == "quantize/a"


def test_models_above_the_budget_are_not_avoided(advice):
    assert "Avoid" not in lines_of(advice, budget=45)  # `small` fits, `bad` does not
    assert "Avoid" in lines_of(advice, budget=50)


def test_a_score_with_a_word_but_no_items_to_compare_is_not_judged():
    table = of_items({"base/m": losing(0), "noise/n": losing(9), "quantize/close": losing(2)})
    table.scores.loc[table.scores["candidate"] == "noise/n", "source"] = "base/m"
    kept = table.samples[table.samples["candidate"] != "quantize/close"]
    lines = lines_of(answers(Results(table.scores, kept), SIZES | {"noise/n": 100}))
    text = "none: each is worse by more than 2 % on a score or was not tested."
    assert lines["Smallest acceptable"] == (None, text)


def test_draws_of_a_recipe_are_judged_by_the_worst():
    draws = {"prune/first": losing(160), "prune/lucky": losing(100), "prune/third": losing(161)}
    table = of_items({"base/m": losing(0)} | draws)
    sizes = {"base/m": 100} | dict.fromkeys(draws, 50)
    # Alone, the lucky draw is surely within 15 %.
    assert lines_of(answers(table, sizes, margin=0.15), margin=0.15)["Ship"][0] == "prune/lucky"
    advice = answers(table, sizes, margin=0.15, noise={"first": tuple(draws)})
    lines = lines_of(advice, margin=0.15)
    assert "Ship" not in lines and lines["Smallest acceptable"][0] is None
    assert "first (worst of 3 draws) loses least" in lines["Smallest acceptable"][1]
    wide = lines_of(advice, margin=0.2)["Ship"]
    assert wide[0] == "prune/first" and wide[1].endswith("(worst of 3 draws).")
