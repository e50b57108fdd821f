"""Windows are counted before anything runs, by the functions of the stages, and once a text."""

import json
from pathlib import Path

import pytest

from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.corpus.windows import Windows, calibration_windows
from stages.job.checks import counts
from stages.job.checks.counts import COUNTS, of_windows
from stages.job.load import checked_params, load_verified
from stages.job.pieces import scope
from tests import families, project


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    project.write_inputs(tmp_path / "inputs")
    return project.params(tmp_path / "inputs")


def number(lines: list[str], start: str) -> int:
    (line,) = [line for line in lines if line.startswith(start) and "learn" in line]
    return int(line.split()[1])


def test_the_stage_has_as_many_windows_as_are_counted(raw):
    mistakes, lines = of_windows(checked_params(raw))
    assert mistakes == []
    count = number(lines, "news: ")
    checked_params(raw).datasets["news"].download("news")

    def ask(samples: int) -> int:
        wanted = Windows(dataset="news", num_samples=samples, sequence_length=32)
        return len(calibration_windows(families.tokenizer(), wanted, families.VOCAB))

    assert ask(count) == count
    with pytest.raises(Refusal, match=f"has {count} distinct windows"):
        ask(count + 1)


def test_too_few_windows_are_refused_before_anything_runs(raw):
    raw["prune"]["wanda-50"]["calibration"]["num_samples"] = 1000
    raw["finetune"]["wanda-50-lora"]["train"] = {
        **raw["finetune"]["wanda-50-lora"]["train"], "num_samples": 4, "held_out": 2000,
    }  # fmt: skip
    raw["suites"]["perplexity"]["news"]["windows"] = 3000
    raw["teach"]["lesson"] = {
        "source": "base/tiny", "method": "logits", "dataset": "news", "num_samples": 4000, "held_out": 1,
        "sequence_length": 32, "batch_size": 2,
    }  # fmt: skip
    project.write(Path(), raw)
    with pytest.raises(Refusal) as caught:
        load_verified()
    for place, number in (
        ("prune.wanda-50.calibration.num_samples", 1000),
        ("finetune.wanda-50-lora.train.held_out", 2000),
        ("suites.perplexity.news.windows", 3000),
        ("teach.lesson.num_samples", 4000),
    ):
        assert f"{place}: {number} window(s) asked for, but data set news has 23" in str(caught.value)
    assert not Path("data/datasets").exists()


def test_a_length_that_the_model_does_not_read_is_refused(raw):
    raw["suites"]["perplexity"]["news"]["sequence_length"] = 300
    assert of_windows(checked_params(raw))[0] == [
        "suites.perplexity.news.sequence_length: 300 given, but base/tiny reads 256 tokens at most; lower it."
    ]


def test_a_text_is_counted_once(raw, monkeypatch):
    before = of_windows(checked_params(raw))
    kept = json.loads(COUNTS.read_text())
    monkeypatch.setattr(counts, "_count", lambda *_: pytest.fail("counted again"))
    assert of_windows(checked_params(raw)) == before
    assert json.loads(COUNTS.read_text()) == kept


def test_another_text_is_counted_again(raw, tmp_path):
    first = number(of_windows(checked_params(raw))[1], "news: ")
    (tmp_path / "inputs" / "news.txt").write_text(project.text(9, documents=20))
    raw["datasets"]["news"]["sha256"] = sha256(tmp_path / "inputs" / "news.txt")
    assert number(of_windows(checked_params(raw))[1], "news: ") < first


def test_what_is_not_here_is_left_to_the_stages(raw, monkeypatch):
    raw["datasets"]["news"]["source"] = "hub:org/news@" + "0" * 40
    assert of_windows(checked_params(raw)) == ([], [])
    raw["datasets"]["news"]["source"] = raw["datasets"]["speeches"]["source"]
    monkeypatch.setattr(counts, "LARGEST_TEXT", 10)
    assert of_windows(checked_params(raw)) == ([], [])


def test_a_downloaded_text_is_counted_if_it_is_of_these_params(raw):
    checked_params(raw).datasets["news"].download("news")
    expected = number(of_windows(checked_params(raw))[1], "news: ")
    facts = json.loads(Path("data/datasets/news/dataset.json").read_text())
    raw["datasets"]["news"]["source"] = facts["source"] = "hub:org/news@" + "0" * 40
    assert of_windows(checked_params(raw)) == ([], [])
    Path("data/datasets/news/dataset.json").write_text(json.dumps(facts))
    assert number(of_windows(checked_params(raw))[1], "news: ") == expected


def test_a_mix_is_counted_by_part(raw):
    parts = {name: {**raw["datasets"][name], "share": 0.5} for name in ("news", "speeches")}
    raw["datasets"]["blend"] = {"kind": "mix", "parts": parts}
    raw["prune"]["wanda-50"]["calibration"] = {"dataset": "blend", "num_samples": 900, "sequence_length": 32}
    mistakes, _ = of_windows(checked_params(raw))
    assert [mistake.split(" asked")[0] for mistake in mistakes] == [
        "prune.wanda-50.calibration.num_samples: 450 window(s)"
    ] * 2
    assert "data set blend, part speeches, has" in mistakes[1]


def test_a_suite_must_not_score_what_a_mix_learns_from(raw):
    parts = {name: {**raw["datasets"][name], "share": 0.5} for name in ("news", "speeches")}
    raw["datasets"]["blend"] = {"kind": "mix", "parts": parts}
    raw["prune"]["wanda-50"]["calibration"]["dataset"] = "blend"
    learned = scope(checked_params(raw)).learned_from("prune/wanda-50")
    assert learned == ["blend", "news", "speeches"]  # so the report marks what is in their domain
    parts["news"]["calibration"] = 0.7
    with pytest.raises(
        Refusal, match=r"suites.perplexity.news: recipes learn from .* with another calibration"
    ):
        checked_params(raw)
