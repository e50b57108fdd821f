"""ROUGE against examples of its paper."""

import pytest

from stages.evaluation.tasks import rouge


def test_rouge_counts_words_pairs_and_the_longest_sequence():
    # Lin (2004), section 3: S1 against S2 and S3; F-measures of 3 shared words in order, and of 2.
    reference = {"summary": "police killed the gunman"}
    close, far = (
        rouge.process_results(reference, [s]) for s in ("police kill the gunman", "the gunman kill police")
    )
    assert close["rougeL"] == 1  # kill and killed have one stem
    assert far["rougeL"] == 0.5 and far["rouge1"] == 1
    assert far["rouge2"] == pytest.approx(1 / 3)
