"""States against the model's own, and the rows of Information Emergence."""

import pytest
import torch

from stages.core.errors import Refusal
from stages.evaluation import emergence
from stages.evaluation.emergence import states
from tests import begins, families
from tests.pipeline import do, params
from tests.scoring import changed, scored

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize("family", sorted(families.CONFIGS))
def test_states_are_those_between_blocks(family):
    model = families.model(family).float()
    rows = families.windows(5, 6, high=250)
    with torch.no_grad():
        hidden = model(input_ids=rows, output_hidden_states=True).hidden_states
    ours = states(model, rows, 2)
    assert len(ours) == len(hidden) == 3
    # The model's last hidden state has been through its final norm.
    for state, other in zip(ours[:-1], hidden[:-1], strict=True):
        torch.testing.assert_close(state, other[:, -1].to(state.device))
    assert ours[-1].shape == ours[0].shape and not torch.equal(ours[-1], ours[-2])


def emergent(**options: int) -> dict:
    news = {"windows": 3, "sequence_length": 32, "batch_size": 2, "emergence": {"windows": 64} | options}
    return {"perplexity": {"news": news}, "graded": {}, "benchmark": {}}


def test_every_block_has_a_row_and_the_same_again(workspace):
    chosen = changed(params("llama", {}), suites=emergent(steps=5))
    do(chosen)
    first, second = (scored(chosen, "base/tiny", "news")[0] for _ in range(2))
    assert first.drop(columns="lineage").equals(second.drop(columns="lineage"))
    rows = first[first.metric == "information_emergence"]
    assert rows.difficulty.tolist() == ["all", "block-0", "block-1"]
    assert rows.value.iloc[0] == pytest.approx(rows.value.iloc[1:].mean())
    assert (rows.num_items == 32).all() and rows.prompt_hash.isna().all()
    assert not first.bos.any()
    metrics = {name: group.value.to_numpy() for name, group in first.groupby("metric")}
    gained = metrics["macro_information"] - metrics["micro_information"]
    assert metrics["information_emergence"] == pytest.approx(gained)
    assert rows.task_version.iloc[0].endswith("at most 5.00 bits")
    assert first[first.readout == "states"].value.abs().max() <= 5


def test_both_variables_are_read_after_bos(workspace, monkeypatch):
    chosen = changed(params("llama", {}), suites=emergent(steps=1))
    do(chosen)
    begins.tokenizer("bos").save_pretrained("data/models/base/tiny")
    seen = []
    monkeypatch.setattr(emergence, "states", lambda _, rows, __: seen.append(rows) or states(_, rows, __))
    assert scored(chosen, "base/tiny", "news")[0].bos.all()
    whole, alone = seen
    assert whole.shape == (64, 9) and alone.shape == (64, 2)
    assert (whole[:, 0] == begins.BOS).all() and (alone[:, 0] == begins.BOS).all()
    assert torch.equal(whole[:, -1], alone[:, -1])


def test_windows_longer_than_the_model_reads_are_refused():
    with pytest.raises(Refusal, match="sequence_length 257 is more than the 256 tokens the model reads"):
        states(families.model("opt"), torch.zeros(1, 257, dtype=torch.int64), 1)


def test_a_responder_without_knowledge_has_no_blocks(workspace):
    floors = {"floor/dot": {"source": "base/tiny", "responder": "dot"}}
    chosen = changed(params("llama", floors), suites=emergent(steps=5))
    do(chosen)
    scores, _ = scored(chosen, "floor/dot", "news")
    assert scores.metric.tolist() == ["perplexity", "bits_per_byte"]
    from flows import costs

    assert [row["suite"] for row in costs.costs(chosen, "base/tiny")] == ["news"]
    assert costs.trials(chosen, "base/tiny", "news", items=2, repeats=1)
    with pytest.raises(Refusal, match=r"floor/dot has no model .* name a model"):
        costs.trials(chosen, "floor/dot", "news", items=2)


def test_more_windows_than_the_text_has_are_refused(workspace):
    chosen = changed(params("llama", {}), suites=emergent(windows=10**6))
    do(chosen)
    with pytest.raises(Refusal, match=r"news\.emergence\.windows is 1000000, .* ask for fewer"):
        scored(chosen, "base/tiny", "news")
