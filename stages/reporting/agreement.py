"""How far a candidate answers as its dense parent does, whatever is right.

Accuracy can stay while many single answers change, as losses and wins make up for each other
(2407.09141). So answers are compared one by one:

- same: the share of items, or of draws, that got the parent's very answer.
- lost, won: answers that went from right to wrong, and from wrong to right.
- kl: KL divergence of the parent's distribution over the choices from the candidate's, in bits, a mean over
  items; a distribution is the softmax of the choices' log-likelihoods.
- entropy: of that distribution, in bits. A candidate that has lost what it knew may still be sure (low), or
  spread evenly (log2 of the number of choices).
- generated_tokens: the mean length of an answer, thinking included.

Beside each stands what numerical noise alone did: the furthest that a `noise` candidate of the same base got
from its own source (`noise_same`, `noise_flips`, `noise_kl`). What is no further says nothing.
"""

from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from stages.reporting.collect import Results, competes, is_noise

MEASURE = ["suite", "task", "readout", "budget"]
ITEM = [*MEASURE, "draw", "doc_id", "prompt_hash"]


def agreement(results: Results) -> pd.DataFrame:
    """A row a measure of each candidate that competes and is no dense base, in the order of the candidates.

    Columns: `candidate`, `reference`, `base`, those of `MEASURE`, `items`, `same`, `lost`, `won` (missing
    where items are not right or wrong), `kl`, `entropy`, `reference_entropy` (likelihoods only),
    `generated_tokens`, `reference_generated_tokens` (generation only), and the three of noise. A candidate
    whose base was not evaluated, or on other prompts, has none.
    """
    answers = _answers(results.samples)
    first = results.scores.drop_duplicates("candidate")
    lineages = {
        str(name): str(line).split(" > ")
        for name, line in zip(first["candidate"], first["lineage"], strict=True)
    }
    bases = dict(zip(lineages, first["base"], strict=True))
    noisy, competing = (list(map(str, first[kind(first)]["candidate"])) for kind in (is_noise, competes))
    rows = [
        {"candidate": name, "reference": lineage[0], "base": bases[name], **row}
        for name, lineage in ((name, lineages[name]) for name in competing)
        if name != lineage[0]
        for row in _between(answers, name, lineage[0])
    ]
    floors = [
        {"base": bases[name], **row} for name in noisy for row in _between(answers, name, lineages[name][-2])
    ]
    columns = [
        "candidate", "reference", "base", *MEASURE, "items", "same", "lost", "won", "kl", "entropy",
        "reference_entropy", "generated_tokens", "reference_generated_tokens",
    ]  # fmt: skip
    noise = pd.DataFrame(floors, columns=columns)
    noise["flips"] = noise["lost"] + noise["won"]
    furthest = noise.groupby(["base", *MEASURE], dropna=False, as_index=False).agg(
        noise_same=("same", "min"), noise_flips=("flips", "max"), noise_kl=("kl", "max")
    )
    made = pd.DataFrame(rows, columns=columns)
    kinds = {name: made[name].dtype for name in ("base", *MEASURE)}
    return made.merge(furthest.astype(kinds), on=["base", *MEASURE], how="left")


def entropy(log_likelihoods: Any) -> float:
    """Of the softmax of `[choices]` log-likelihoods in nats, in bits."""
    return float(special.entr(special.softmax(log_likelihoods)).sum() / np.log(2))


def divergence(log_likelihoods: Any, of: Any) -> float:
    """KL(softmax(`of`) || softmax(`log_likelihoods`)) over the same `[choices]`, in bits."""
    terms = special.rel_entr(special.softmax(of), special.softmax(log_likelihoods))
    return float(terms.sum() / np.log(2))


def _answers(samples: pd.DataFrame) -> pd.DataFrame:
    """One row an answer: several metrics of one answer are told by the first."""
    told = samples[samples["response"].notna()]
    return told.drop_duplicates(["candidate", *ITEM])


def _between(answers: pd.DataFrame, ours: str, reference: str) -> list[dict[str, Any]]:
    sides = (answers[answers["candidate"] == name] for name in (ours, reference))
    both = next(sides).merge(next(sides), on=ITEM, suffixes=("", "_base"))
    return [
        dict(zip(MEASURE, key, strict=True)) | _compared(found)
        for key, found in both.groupby(MEASURE, dropna=False, sort=False)
    ]


def _compared(found: pd.DataFrame) -> dict[str, Any]:
    made: dict[str, Any] = {
        "items": len(found),
        "same": float((found["response"] == found["response_base"]).mean()),
    }
    if set(found["score"]) | set(found["score_base"]) <= {0.0, 1.0}:
        made["lost"] = int((found["score"] < found["score_base"]).sum())
        made["won"] = int((found["score"] > found["score_base"]).sum())
    if found[["log_likelihoods", "log_likelihoods_base"]].notna().all(axis=None):
        pairs = list(zip(found["log_likelihoods"], found["log_likelihoods_base"], strict=True))
        made["kl"] = float(np.mean([divergence(one, of=other) for one, other in pairs]))
        made["entropy"] = float(np.mean([entropy(one) for one, _ in pairs]))
        made["reference_entropy"] = float(np.mean([entropy(other) for _, other in pairs]))
    if found[["generated_tokens", "generated_tokens_base"]].notna().all(axis=None):
        made["generated_tokens"] = float(found["generated_tokens"].mean())
        made["reference_generated_tokens"] = float(found["generated_tokens_base"].mean())
    return made
