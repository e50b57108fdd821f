"""ROUGE of a summary: the words, pairs of words and longest sequence it has in common with the reference.

C.-Y. Lin, "ROUGE: a package for automatic evaluation of summaries" (2004), by the package `rouge-score`:
F-measures of stemmed words, as papers on XSum report them.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_KINDS = ("rouge1", "rouge2", "rougeL")


def process_results(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Return F-measures in [0, 1] of the first of `results` against the document's `summary`."""
    scores = _scorer().score(doc["summary"], results[0])
    return {kind: float(scores[kind].fmeasure) for kind in _KINDS}


@cache
def _scorer() -> "RougeScorer":
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(_KINDS, use_stemmer=True)
