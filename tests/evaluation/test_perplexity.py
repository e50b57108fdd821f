"""Bits a byte, against the bytes themselves."""

import math

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.evaluation.perplexity import predicted_bytes
from tests import families
from tests.pipeline import do, params
from tests.test_evaluate import scored


def test_bits_a_byte_are_those_of_the_text_that_was_predicted(workspace):
    chosen = params("llama", {})
    do(chosen)
    scores, samples = scored(chosen, "base/tiny", "news")
    text = "\n\n".join(pd.read_parquet("data/datasets/news/evaluation.parquet")["text"]).encode()
    suite = chosen.suites.perplexity["news"]
    # The tokenizer has a token a byte; of each window the first is not predicted.
    cut = [text[i * suite.sequence_length :][1 : suite.sequence_length] for i in range(suite.windows)]
    row = scores[scores.metric == "bits_per_byte"].iloc[0]
    nats = -sum(likelihoods[0] for likelihoods in samples.log_likelihoods)
    assert row.value == pytest.approx(nats / math.log(2) / sum(map(len, cut)))
    assert row.num_items == suite.windows and not row.higher_is_better and row.stderr > 0


@settings(deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4), st.integers(2, 8))
def test_bytes_of_windows_add_up_to_those_of_the_text(texts, length):
    tokenizer, text = families.tokenizer(), "\n\n".join(texts)
    whole = [len(text[: i + 1].encode()) for i in range(len(text))]
    found = predicted_bytes(tokenizer, texts, length)
    assert len(found) == len(text.encode()) // length
    # Windows end where characters do, up to the character that a window's edge splits.
    assert all(abs(size - (length - 1)) <= 3 for size in found)
    assert sum(found) <= (whole[-1] if whole else 0)
