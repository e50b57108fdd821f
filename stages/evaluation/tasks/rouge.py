"""ROUGE of a summary: how much of the reference's words, pairs and longest sequence it shares.

C.-Y. Lin, "ROUGE: a package for automatic evaluation of summaries" (2004), by the package `rouge-score`:
F-measure, words stemmed, as XSum's papers report it.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

KINDS = ("rouge1", "rouge2", "rougeL")


def process_results(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """F-measures in [0, 1] of the first of `results` against the document's `summary`."""
    scores = _scorer().score(doc["summary"], results[0])
    return {kind: float(scores[kind].fmeasure) for kind in KINDS}


@cache
def _scorer() -> "RougeScorer":
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(KINDS, use_stemmer=True)
