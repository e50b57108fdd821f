"""How far the predictions of a candidate are from its dense base's, token by token on plain text.

Each side has its likeliest tokens at every position (`stages.evaluation.likeliest`). Scores, a suite each:

- kl: KL(base || candidate) in nats, the mean over tokens; kl_median and kl_p95, whose tokens are the worst.
- same_top: the share of tokens at which both find the same next token likeliest.

Both also by the base's confidence, the probability of its likeliest token, in place of difficulty: where the
base is `sure` (over .9), where it is `likely` (over .5), and where it is `unsure`.

KL is that of distributions over the base's likeliest tokens and all others together, so it is a lower bound.
Of the base's likeliest tokens, those among the candidate's likeliest have their own probability there, and so
has the token that follows in the text; another has at most that of the candidate's last. The bound is tight
for a candidate close to its base, and loose for one that finds quite other tokens likely.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stages.core.tables import SAMPLE_COLUMNS, SCORE_COLUMNS, table

VERSION = 1
"""Raised when scores change for the same tokens; only the report depends on it."""
_TINY = 1e-12
_LEVELS = (("sure", 0.9), ("likely", 0.5), ("unsure", 0.0))
"""Levels of the base's confidence and where each begins."""
_Floats: TypeAlias = NDArray[np.float64]
_Ids: TypeAlias = NDArray[np.integer[Any]]


def divergences(
    scores: pd.DataFrame, samples: pd.DataFrame, tokens: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the score rows and the sample rows, a window each, of all candidates beside their base.

    Args:
        scores, samples: the rows of perplexities, whose other columns are taken over.
        tokens: `stages.core.tables.token_table` of every candidate.
    """
    perplexities = scores[scores["metric"] == "perplexity"]
    windows = samples[samples["metric"] == "nats_per_token"]
    score_rows: list[dict[str, Any]] = []
    sample_rows: list[dict[str, Any]] = []
    kept = dict(iter(tokens.groupby(["candidate", "suite"], sort=False)))
    for row in perplexities.to_dict("records"):
        base = f"base/{row['base']}"
        ours, theirs = (kept.get((name, row["suite"])) for name in (row["candidate"], base))
        if ours is None or theirs is None or row["candidate"] == base:
            continue
        # Windows of equal tokens have equal predictions.
        ours, theirs = ours.drop_duplicates("prompt_hash"), theirs.drop_duplicates("prompt_hash")
        both = ours.merge(theirs, on="prompt_hash", suffixes=("", "_base"))
        if both.empty:
            continue
        pairs = [_compared(pair) for pair in both.to_dict("records")]
        kl, same, sure = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        score_rows += _scores({str(key): value for key, value in row.items()}, kl, same, sure, pairs)
        known = windows[(windows["candidate"] == row["candidate"]) & (windows["suite"] == row["suite"])]
        known = known.drop_duplicates("prompt_hash")
        shared = known.set_index("prompt_hash").loc[both["prompt_hash"]].reset_index().to_dict("records")
        for window, (nats, agreed, _) in zip(shared, pairs, strict=True):
            about = {str(key): value for key, value in window.items()} | {"log_likelihoods": None}
            sample_rows.append(about | {"metric": "kl", "score": float(nats.mean())})
            sample_rows.append(about | {"metric": "same_top", "score": float(agreed.mean())})
    columns = dict(SCORE_COLUMNS)
    return table(score_rows, columns), table(sample_rows, SAMPLE_COLUMNS)


def _scores(
    row: Mapping[str, Any], kl: _Floats, same: _Floats, sure: _Floats, pairs: Sequence[tuple[_Floats, ...]]
) -> list[dict[str, Any]]:
    """Return the score rows of a candidate and suite from all tokens, and the windows' standard errors."""
    shared = {key: row[key] for key in SCORE_COLUMNS} | {
        "task_version": f"{row['task_version']}; divergence {VERSION}", "floor": None, "stderr": None,
    }  # fmt: skip
    rows = []
    for metric, better, values, place in (("kl", False, kl, 0), ("same_top", True, same, 1)):
        means = np.array([pair[place].mean() for pair in pairs])
        stderr = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None
        rows.append(
            shared
            | {"metric": metric, "value": float(values.mean()), "stderr": stderr}
            | {"higher_is_better": better}
        )
        above = np.inf
        for level, begin in _LEVELS:
            chosen = values[(sure > begin) & (sure <= above)]
            above = begin
            if len(chosen):
                of_level = {"difficulty": level, "value": float(chosen.mean()), "num_items": len(chosen)}
                rows.append(shared | {"metric": metric, "higher_is_better": better} | of_level)
    for metric, share in (("kl_median", 0.5), ("kl_p95", 0.95)):
        value = float(np.quantile(kl, share))
        rows.append(shared | {"metric": metric, "value": value, "higher_is_better": False})
    return rows


def _compared(pair: Mapping[Any, Any]) -> tuple[_Floats, _Floats, _Floats]:
    """Return KL, whether the likeliest token is the same, and the base's confidence, by token."""
    count = len(pair["target"])
    ids, ids_base = (np.asarray(pair[name]).reshape(count, -1) for name in ("ids", "ids_base"))
    logs, logs_base = (
        np.asarray(pair[name], np.float64).reshape(count, -1) for name in ("logs", "logs_base")
    )
    return (
        token_divergence(
            ids_base, logs_base, ids, logs, np.asarray(pair["next"]), np.asarray(pair["target"])
        ),
        (ids[:, 0] == ids_base[:, 0]).astype(np.float64),
        np.exp(logs_base[:, 0]),
    )


def token_divergence(
    ids_base: _Ids, logs_base: _Floats, ids: _Ids, logs: _Floats, follows: _Ids, log_follows: _Floats
) -> _Floats:
    """Return KL(base || candidate) in nats over the base's likeliest tokens and all others, `[tokens]`.

    Args:
        ids_base, ids: `[tokens, top]`, the likeliest tokens of either side.
        logs_base, logs: the logarithms of their probabilities, in descending order.
        follows: `[tokens]`, the tokens of the text.
        log_follows: `[tokens]`, the logarithms of their probabilities to the candidate.
    """
    same = ids_base[:, :, None] == ids[:, None, :]
    known = same.any(axis=2)
    ours = np.where(known, np.take_along_axis(logs, same.argmax(axis=2), axis=1), logs[:, -1:])
    is_next = ids_base == follows[:, None]
    ours = np.where(is_next & ~known, log_follows[:, None], ours)
    known |= is_next
    p = np.exp(logs_base)
    rest = np.clip(1 - p.sum(axis=1), _TINY, None)
    rest_ours = np.clip(1 - np.where(known, np.exp(ours), 0.0).sum(axis=1), _TINY, None)
    total = (p * (logs_base - ours)).sum(axis=1) + rest * np.log(rest / rest_ours)
    return np.asarray(np.maximum(total, 0.0))
