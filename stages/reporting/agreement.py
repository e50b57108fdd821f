"""Measure how often a candidate gives the same answer as its dense base, right or wrong.

Accuracy can stay while many single answers change, since losses and wins cancel (2407.09141). So answers are
compared one by one:

- same: the share of items, or of draws, whose answer is identical to the base's.
- lost, won: answers that went from right to wrong, and from wrong to right.
- kl: KL divergence of the base's distribution over the choices from the candidate's, in bits, a mean over
  items; a distribution is the softmax of the choices' log-likelihoods.
- entropy: the entropy of that distribution, in bits. A candidate that has lost its knowledge may still be
  sure (low), or spread evenly (log2 of the number of choices).
- generated_tokens: the mean length of an answer, thinking included.

Beside each stands the effect of numerical noise alone: the largest deviation of a `noise` candidate of the
same base from its own source (`noise_same`, `noise_flips`, `noise_kl`). Ignore any change no larger than
that.
"""

from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from stages.core.tables import SAMPLE_COLUMNS
from stages.reporting.collect import Results, competes, is_noise

_QUESTIONS = ["suite", "task", "readout", "budget"]
_ANSWER = [*_QUESTIONS, "draw", "doc_id", "prompt_hash"]
_KINDS = {"base": "str", **{name: SAMPLE_COLUMNS[name] for name in _QUESTIONS}}


def agreement(results: Results, reference: str | None = None) -> pd.DataFrame:
    """Compare the answers of every competing candidate with its reference's, in the order of the candidates.

    Args:
        reference: the candidate that all are compared with; None: the dense base of each.

    Returns:
        A row for each suite, task, readout and budget of each candidate whose base answered the same
        prompts. Columns: `candidate`, `reference`, `base`, `suite`, `task`, `readout`, `budget`, `items`,
        `same`, `lost` and `won` (missing unless every score is 0 or 1), `kl`, `entropy` and
        `reference_entropy` (likelihoods only), `generated_tokens` and `reference_generated_tokens`
        (generation only), and the three of noise.
    """
    answers = _answers(results.samples)
    subjects = results.scores.drop_duplicates("candidate")
    columns = [
        "candidate", "reference", "base", *_QUESTIONS, "items", "same", "lost", "won", "kl", "entropy",
        "reference_entropy", "generated_tokens", "reference_generated_tokens",
    ]  # fmt: skip

    def compared(chosen: pd.DataFrame, references: "pd.Series[str]") -> pd.DataFrame:
        rows = [
            {"candidate": candidate, "reference": reference, "base": base, **row}
            for candidate, base, reference in zip(
                chosen["candidate"], chosen["base"], references, strict=True
            )
            if candidate != reference
            for row in _pair(answers, candidate, reference)
        ]
        return pd.DataFrame(rows, columns=columns).astype(_KINDS)

    noisy, competing = subjects[is_noise(subjects)], subjects[competes(subjects)]
    noise = compared(noisy, noisy["source"])
    noise["flips"] = noise["lost"] + noise["won"]
    furthest = noise.groupby(["base", *_QUESTIONS], dropna=False, as_index=False).agg(
        noise_same=("same", "min"), noise_flips=("flips", "max"), noise_kl=("kl", "max")
    )
    references = pd.Series(reference or "base/" + competing["base"], index=competing.index)
    rows = compared(competing, references)
    return rows.merge(furthest, on=["base", *_QUESTIONS], how="left")


def choice_entropy(log_likelihoods: Any) -> float:
    """Return the entropy of the softmax of `[choices]` log-likelihoods in nats, in bits."""
    return float(special.entr(special.softmax(log_likelihoods)).sum() / np.log(2))


def choice_divergence(log_likelihoods: Any, of: Any) -> float:
    """Return KL(softmax(`of`) || softmax(`log_likelihoods`)) over the same `[choices]`, in bits."""
    terms = special.rel_entr(special.softmax(of), special.softmax(log_likelihoods))
    return float(terms.sum() / np.log(2))


def _answers(samples: pd.DataFrame) -> pd.DataFrame:
    """Keep one row an answer, that of its first metric."""
    return samples[samples["response"].notna()].drop_duplicates(["candidate", *_ANSWER])


def _pair(answers: pd.DataFrame, ours: str, reference: str) -> list[dict[str, Any]]:
    sides = (answers[answers["candidate"] == name] for name in (ours, reference))
    both = next(sides).merge(next(sides), on=_ANSWER, suffixes=("", "_base"))
    return [
        dict(zip(_QUESTIONS, key, strict=True)) | _figures(pairs)
        for key, pairs in both.groupby(_QUESTIONS, dropna=False, sort=False)
    ]


def _figures(pairs: pd.DataFrame) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "items": len(pairs),
        "same": float((pairs["response"] == pairs["response_base"]).mean()),
    }
    if set(pairs["score"]) | set(pairs["score_base"]) <= {0.0, 1.0}:
        figures["lost"] = int((pairs["score"] < pairs["score_base"]).sum())
        figures["won"] = int((pairs["score"] > pairs["score_base"]).sum())
    if pairs[["log_likelihoods", "log_likelihoods_base"]].notna().all(axis=None):
        ours, base = list(pairs["log_likelihoods"]), list(pairs["log_likelihoods_base"])
        figures["kl"] = float(np.mean([choice_divergence(a, of=b) for a, b in zip(ours, base, strict=True)]))
        figures["entropy"] = float(np.mean([choice_entropy(a) for a in ours]))
        figures["reference_entropy"] = float(np.mean([choice_entropy(b) for b in base]))
    if pairs[["generated_tokens", "generated_tokens_base"]].notna().all(axis=None):
        figures["generated_tokens"] = float(pairs["generated_tokens"].mean())
        figures["reference_generated_tokens"] = float(pairs["generated_tokens_base"].mean())
    return figures
