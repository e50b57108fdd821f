"""Mutual information against distributions whose own is known; states against the model's own."""

import math

import pytest
import torch

from flows import costs
from stages.core.errors import Refusal
from stages.evaluation.emergence import mutual_information, states
from tests import families
from tests.pipeline import do, params
from tests.test_evaluate import changed, scored


def pair(rho: float, seed: int, rows: int = 1024, width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussians, each column of one correlated with the same column of the other by `rho`."""
    draw = torch.Generator().manual_seed(seed)
    x, other = (torch.randn(rows, width, generator=draw) for _ in range(2))
    return x, rho * x + math.sqrt(1 - rho**2) * other


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.5, 0.9])
def test_mutual_information_of_gaussians_is_bounded_from_below_and_closely(rho):
    truth = -4 / 2 * math.log2(1 - rho**2)
    found = [mutual_information(*pair(rho, seed), 200, 64, seed) for seed in range(3)]
    assert all(truth * 0.6 - 0.05 <= value <= truth * 1.1 + 0.05 for value in found)


def test_mutual_information_does_not_grow_with_fitting_where_there_is_none():
    assert mutual_information(*pair(0.0, 0, rows=128, width=64), 300, 64, 0) == 0


def test_mutual_information_depends_on_neither_scale_nor_place():
    x, y = pair(0.8, 0)
    assert mutual_information(1000 * x + 5, y / 1000 - 5, 50, 16, 0) == pytest.approx(
        mutual_information(x, y, 50, 16, 0), abs=0.01
    )
    # A column that never changes says nothing and breaks nothing.
    still = torch.cat([x, torch.ones(len(x), 1)], 1)
    assert mutual_information(still, y, 200, 64, 0) > 1


@pytest.mark.parametrize("family", sorted(families.CONFIGS))
def test_states_are_those_between_blocks(family):
    model = families.model(family).float()
    rows = torch.randint(0, 250, (5, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model(input_ids=rows, output_hidden_states=True).hidden_states
    found = states(model, rows, 2)
    assert len(found) == len(hidden) == 3
    # The last that the model tells of has been through its final norm.
    for ours, theirs in zip(found[:-1], hidden[:-1], strict=True):
        torch.testing.assert_close(ours, theirs[:, -1])
    assert found[-1].shape == found[0].shape and not torch.equal(found[-1], found[-2])


def emergent(**options: int) -> dict:
    news = {"windows": 3, "sequence_length": 32, "batch_size": 2, "emergence": {"windows": 64} | options}
    return {"perplexity": {"news": news}, "graded": {}, "benchmark": {}}


def test_every_block_has_a_row_and_the_same_one_again(workspace):
    chosen = changed(params("llama", {}), suites=emergent(steps=5))
    do(chosen)
    first, second = (scored(chosen, "base/tiny", "news")[0] for _ in range(2))
    assert first.equals(second)
    rows = first[first.metric == "information_emergence"]
    assert rows.difficulty.tolist() == ["all", "block-0", "block-1"]
    assert rows.value.iloc[0] == pytest.approx(rows.value.iloc[1:].mean())
    assert (rows.num_items == 32).all()


def test_what_is_no_model_has_no_blocks(workspace):
    floors = {"floor/dot": {"source": "base/tiny", "responder": "dot"}}
    chosen = changed(params("llama", floors), suites=emergent(steps=5))
    do(chosen)
    scores, _ = scored(chosen, "floor/dot", "news")
    assert scores.metric.tolist() == ["perplexity", "bits_per_byte"]
    assert [row["suite"] for row in costs.costs(chosen, "base/tiny")] == ["news"]
    assert costs.trials(chosen, "base/tiny", "news", items=2, repeats=1)
    with pytest.raises(Refusal, match=r"floor/dot has no model, .* name a model"):
        costs.trials(chosen, "floor/dot", "news", items=2)


def test_more_windows_than_the_text_has_are_refused(workspace):
    chosen = changed(params("llama", {}), suites=emergent(windows=10**6))
    do(chosen)
    with pytest.raises(Refusal, match=r"news\.emergence\.windows: 1000000 asked for, .* ask for fewer"):
        scored(chosen, "base/tiny", "news")
