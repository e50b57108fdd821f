"""Metrics over several draws of an answer.

- pass@k, the chance that at least one of k draws is right: 1 - C(n - c, k) / C(n, k) for n draws of which c
  are right, the unbiased estimate (Chen et al., 2107.03374).
- maj@n, whether the most frequent answer is right (self-consistency, 2203.11171).
- repetition, the share of 4-word runs that the text has had before (1908.04319).
- self-BLEU, the BLEU-4 of each draw against the other draws (1802.01886).
"""

import math
from collections import Counter
from collections.abc import Sequence

from stages.evaluation.means import mean

_RUN = 4
"""Words of a run."""


def pass_at_k(draws: int, right: int, k: int) -> float:
    """Return the chance that at least one is right of `k` out of `draws` draws, of which `right` are."""
    return 1 - math.comb(draws - right, k) / math.comb(draws, k)


def majority(votes: Sequence[str], right: Sequence[float]) -> float:
    """Return whether the answer with most votes is right, in [0, 1]; of tied answers, the share that is.

    Args:
        votes: what each draw answered, "" for no answer, which does not vote.
        right: whether each draw was right, 0 or 1.
    """
    counts = Counter(vote for vote in votes if vote)
    if not counts:
        return 0.0
    most = max(counts.values())
    winners = [vote for vote, count in counts.items() if count == most]
    return mean([right[votes.index(winner)] for winner in winners])


def repetition(text: str) -> float:
    """Return the share of 4-word runs that occurred earlier in the text, in [0, 1); 0 without any run."""
    words = text.split()
    runs = [tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """Return the mean BLEU-4 of each text against all others, in [0, 1]; a text without words has 0."""
    import sacrebleu

    return mean(
        [
            sacrebleu.sentence_bleu(text, [*texts[:i], *texts[i + 1 :]]).score / 100
            for i, text in enumerate(texts)
        ]
    )
