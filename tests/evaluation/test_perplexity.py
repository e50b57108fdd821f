"""Perplexity and bits per byte against the same quantities written out slowly."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.errors import Refusal
from stages.evaluation.perplexity import predicted_bytes
from stages.job.params import Params
from stages.reporting.collect import collect
from tests import begins, families, fewrows
from tests.pipeline import NONE, do, load, params
from tests.scoring import changed, log_likelihood, scored

pytestmark = [pytest.mark.numerics, pytest.mark.device]


def asking(**options: Any) -> Params:
    """Params with one suite, of perplexity."""
    news = {"windows": 3, "sequence_length": 32, "batch_size": 2} | options
    suites = {"perplexity": {"news": news}, "graded": {}, "benchmark": {}}
    return changed(params("llama", {}), suites=suites)


def test_perplexity_is_the_slow_one(workspace):
    chosen = params("llama", {})
    do(chosen)
    scores, samples = scored(chosen, "base/tiny", "news")

    text = "\n\n".join(pd.read_parquet("data/datasets/news/evaluation.parquet")["text"])
    ids = families.tokenizer()(text, add_special_tokens=False).input_ids
    model, suite = load("base/tiny"), chosen.suites.perplexity["news"]
    length = suite.sequence_length
    losses = []
    for number in range(suite.windows):
        window = ids[number * length : (number + 1) * length]
        losses.append(-log_likelihood(model, window[:1], window[1:]) / (length - 1))

    row = scores.to_dict("records")[0]
    assert row["metric"] == "perplexity" and not row["higher_is_better"]
    assert row["value"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-3)
    assert row["num_items"] == suite.windows == len(samples)
    assert samples["score"].tolist() == pytest.approx(losses, rel=2e-3)
    assert row["task_version"] == f"windows of {length}"
    assert row["candidate"] == "base/tiny" and row["suite"] == "news" and row["calibration"] == "none"


def with_tokenizer(kind: str, **options: Any) -> None:
    begins.tokenizer(kind, **options).save_pretrained("data/models/base/tiny")


def test_bos_is_context_and_the_same_tokens_are_scored(workspace):
    do(params("llama", {}))
    with_tokenizer("bos")
    found = {bos: scored(asking(bos=bos), "base/tiny", "news") for bos in ("auto", True, False)}
    with_tokenizer("none")
    found["none"] = scored(asking(), "base/tiny", "news")
    for name in ("auto", True):
        pd.testing.assert_frame_equal(found[name][0], found["auto"][0])
    for table in (0, 1):
        pd.testing.assert_frame_equal(found[False][table], found["none"][table])
    assert {name: set(scores["bos"]) for name, (scores, _) in found.items()} == {
        "auto": {True}, True: {True}, False: {False}, "none": {False},
    }  # fmt: skip

    text = "\n\n".join(pd.read_parquet("data/datasets/news/evaluation.parquet")["text"])
    ids, model = families.tokenizer()(text).input_ids, load("base/tiny")
    for name, before in (("auto", [begins.BOS]), (False, [])):
        likelihoods = [row[0] for row in found[name][1]["log_likelihoods"]]
        expected = [
            log_likelihood(model, before + ids[start : start + 1], ids[start + 1 : start + 32])
            for start in (0, 32, 64)
        ]
        assert likelihoods == pytest.approx(expected, rel=2e-3)
        perplexity, per_byte = found[name][0]["value"]
        # A byte is a token, and as many are predicted with BOS as without: 31 a window.
        assert perplexity == pytest.approx(2**per_byte, rel=1e-6)


def test_a_window_may_be_as_long_as_the_model_reads_with_bos_too(workspace):
    do(params("llama", {}))
    values = []
    for kind in ("bos", "none"):
        with_tokenizer(kind)
        scores, samples = scored(asking(windows=2, sequence_length=256), "base/tiny", "news")
        values.append(scores["value"].iloc[0])
        assert len(samples) == 2
    assert values[0] != values[1]
    with_tokenizer("two tokens")
    with pytest.raises(
        Refusal, match=r"news\.sequence_length is 256, but the model reads 255 tokens at most"
    ):
        scored(asking(windows=2, sequence_length=256), "base/tiny", "news")


def test_a_bos_that_the_tokenizer_lacks_is_refused(workspace):
    do(params("llama", {}))
    with_tokenizer("none", bos_token=None)
    with pytest.raises(Refusal, match="bos is true, but the model's tokenizer has no BOS token"):
        scored(asking(bos=True), "base/tiny", "news")
    assert not (Path("data/results") / "base/tiny/news").exists()


def test_windows_are_not_padded_so_the_batch_size_only_changes_rounding(workspace):
    do(params("llama", {}))
    values = []
    for batch_size in (1, 2, 3):
        scores, _ = scored(asking(batch_size=batch_size), "base/tiny", "news")
        assert set(scores["batch_size"]) == {batch_size}
        values.append(scores["value"].iloc[0])
    assert values == pytest.approx([values[0]] * 3, rel=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": 9999}, r"suites\.perplexity\.news\.windows is 9999, .* ask for fewer"),
        ({"sequence_length": 300}, r"news\.sequence_length is 300, .* reads 256 tokens"),
    ],
)
def test_windows_that_do_not_exist_or_that_no_model_reads_are_refused(options, message, workspace):
    chosen = asking(**options)
    do(chosen)
    with pytest.raises(Refusal, match=message):
        scored(chosen, "base/tiny", "news")


def test_text_with_tokens_that_the_embedding_lacks_is_refused(workspace):
    chosen = fewrows.use(asking())
    do(chosen)
    with pytest.raises(Refusal, match=f"evaluation: token .* the model's embedding has {fewrows.ROWS} rows"):
        scored(chosen, "base/tiny", "news")


def test_bits_per_byte_are_those_of_the_predicted_text(workspace):
    chosen = params("llama", {})
    do(chosen)
    scores, samples = scored(chosen, "base/tiny", "news")
    text = "\n\n".join(pd.read_parquet("data/datasets/news/evaluation.parquet")["text"]).encode()
    suite = chosen.suites.perplexity["news"]
    # The tokenizer has a token a byte; the first of each window is not predicted.
    cut = [text[i * suite.sequence_length :][1 : suite.sequence_length] for i in range(suite.windows)]
    row = scores[scores.metric == "bits_per_byte"].iloc[0]
    nats = -sum(likelihoods[0] for likelihoods in samples.log_likelihoods)
    assert row.value == pytest.approx(nats / math.log(2) / sum(map(len, cut)))
    assert row.num_items == suite.windows and not row.higher_is_better and row.stderr > 0


@settings(deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4), st.integers(2, 8))
def test_bytes_of_windows_add_up_to_those_of_the_text(texts, length):
    tokenizer, text = families.tokenizer(), "\n\n".join(texts)
    sizes = predicted_bytes(tokenizer, texts, length)
    assert len(sizes) == len(text.encode()) // length
    # Windows end where characters do, up to the character that a window's edge splits.
    assert all(abs(size - (length - 1)) <= 3 for size in sizes)
    assert sum(sizes) <= len(text.encode())


def test_the_likeliest_tokens_are_kept_for_the_divergence_from_the_base(workspace):
    recipe = {"source": "base/tiny", "method": "rtn", "bits": 2, "group_size": 32, "calibration": NONE}
    news = {"windows": 3, "sequence_length": 32, "batch_size": 2, "divergence": {"top": 8}}
    candidates = ["base/tiny", "quantize/r"]
    chosen = changed(
        params("llama", {"quantize/r": recipe}),
        suites={"perplexity": {"news": news}},
        evaluate={"candidates": candidates},
    )
    do(chosen)
    for name in candidates:
        _, samples = scored(chosen, name, "news")
    kept = pd.read_parquet("data/results/quantize/r/news/tokens.parquet")
    assert kept["ids"].map(len).tolist() == [31 * 8] * 3
    assert [-sum(row) / 31 for row in kept["target"]] == pytest.approx(samples["score"].tolist(), rel=2e-3)
    scores = collect(chosen.evaluations(), candidates, ["news"]).scores
    kl = scores[(scores["metric"] == "kl") & (scores["difficulty"] == "all")]
    assert kl["candidate"].tolist() == ["quantize/r"] and 0 < kl["value"].item() < 5
    before = Path("data/results/quantize/r/news/tokens.parquet").read_bytes()
    scored(chosen, "quantize/r", "news")
    assert Path("data/results/quantize/r/news/tokens.parquet").read_bytes() == before
