"""KL divergence from the base against all of both distributions, and the rows that come of it."""

import numpy as np
import pandas as pd
import pytest

from stages.core.tables import Likeliest, Sample, token_table
from stages.reporting.divergence import divergences, token_divergence
from tests.results import of_items

Sides = tuple[np.ndarray, np.ndarray]


def predictions(seed: int, rows: int = 6, vocabulary: int = 40, spread: float = 2.0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, spread, (rows, vocabulary))
    return np.asarray(logits - np.log(np.exp(logits).sum(1, keepdims=True)))


def likeliest(logs: np.ndarray, top: int) -> Sides:
    ids = np.argsort(-logs, axis=1)[:, :top]
    return ids, np.take_along_axis(logs, ids, 1)


def known(ours: np.ndarray, follows: int = 0) -> Sides:
    """The token that follows, always the same, and the logarithm of its probability."""
    return np.full(len(ours), follows), ours[:, follows]


def full(base: np.ndarray, ours: np.ndarray) -> np.ndarray:
    return np.asarray((np.exp(base) * (base - ours)).sum(1))


def test_all_tokens_give_the_divergence_itself():
    base, ours = predictions(0), predictions(1)
    found = token_divergence(*likeliest(base, 40), *likeliest(ours, 40), *known(ours))
    assert found == pytest.approx(full(base, ours), abs=1e-9)
    assert token_divergence(*likeliest(base, 5), *likeliest(base, 5), *known(base)) == pytest.approx(
        0, abs=1e-9
    )


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_few_tokens_give_a_lower_bound_that_is_tight_where_they_hold_nearly_all(spread):
    base, noise = predictions(2, 200, spread=spread), predictions(3, 200, spread=spread)
    mixed = np.log(0.5 * np.exp(base) + 0.5 * np.exp(noise))
    for ours in (noise, mixed):
        found = token_divergence(*likeliest(base, 8), *likeliest(ours, 8), *known(ours))
        whole = full(base, ours)
        assert (found <= whole + 1e-9).all() and (found >= 0).all()
    if spread == 4:
        held = np.exp(likeliest(base, 8)[1]).sum(1) > 0.95
        assert held.sum() > 50
        assert found[held].mean() > 0.85 * whole[held].mean()


def test_the_token_that_follows_is_known_even_if_the_candidate_finds_it_unlikely():
    base = np.log(np.array([[0.9, 0.05, 0.03, 0.02]]))
    ours = np.log(np.array([[0.001, 0.5, 0.4, 0.099]]))
    for follows, exact in ((0, True), (1, False)):
        found = token_divergence(*likeliest(base, 2), *likeliest(ours, 2), *known(ours, follows))
        assert (found > 5) == exact  # 0.9 log(0.9 / 0.001), or 0.9 log(0.9 / 0.4) at least


def tokens(candidate: str, logs: np.ndarray, top: int = 8) -> pd.DataFrame:
    """Two windows of three tokens."""
    samples = [
        Sample(
            task="t", readout="likelihood", doc_id=i, prompt_hash=str(i), metric="nats_per_token", score=1.0,
            likeliest=Likeliest(*known(logs[rows]), *likeliest(logs[rows], top)),
        )
        for i, rows in enumerate((slice(0, 3), slice(3, 6)))
    ]  # fmt: skip
    return token_table(candidate, "s", samples)


def test_rows_are_by_token_by_window_and_by_confidence_of_the_base():
    nats = {"base/m": [1.0, 2.0], "prune/p": [1.5, 2.5], "prune/q": [2.0, 3.0]}
    results = of_items(nats, metric="perplexity")
    base, ours = predictions(4), predictions(5)
    base[0] = np.log([0.97] + [0.03 / 39] * 39)
    both = pd.concat([tokens("base/m", base), tokens("prune/p", ours)])
    scores, samples = divergences(results.scores, results.samples, both)
    assert set(scores["candidate"]) == {"prune/p"}  # q kept nothing, the base is what they are compared with
    by_token = token_divergence(*likeliest(base, 8), *likeliest(ours, 8), *known(ours))
    value = scores.set_index(["metric", "difficulty"])["value"]
    assert value["kl", "all"] == pytest.approx(by_token.mean())
    assert value["kl", "sure"] == pytest.approx(by_token[0])
    assert value["kl_median", "all"] == pytest.approx(np.median(by_token))
    assert value["same_top", "all"] == (base.argmax(1) == ours.argmax(1)).mean()
    items = scores[(scores["metric"] == "kl") & (scores["difficulty"] != "all")]["num_items"]
    assert items.sum() == 6
    windows = samples[samples["metric"] == "kl"].set_index("doc_id")["score"]
    assert windows.to_dict() == pytest.approx({0: by_token[:3].mean(), 1: by_token[3:].mean()})
    assert scores["task_version"].str.endswith("divergence 1").all()
