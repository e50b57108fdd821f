"""Perplexity and bits per byte against the same quantities written out slowly."""

import math

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.errors import Refusal
from stages.evaluation.perplexity import predicted_bytes
from stages.job.params import Params
from tests import families, fewrows
from tests.pipeline import do, load, params
from tests.scoring import changed, log_likelihood, scored

pytestmark = pytest.mark.numerics


def asking(**options: int) -> Params:
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
