"""RESP: only generated tokens count, the mask grows, exact counts."""

from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from stages.model.blocks import linears
from stages.pruning.gradients import loss_gradients
from stages.pruning.resp import RESP
from tests.pipeline import NONE, TEXT, do, load, params, record

pytestmark = [pytest.mark.numerics, pytest.mark.device]
OWN = TEXT | {"tokens": "generated", "seed": 0, "temperature": 1.0, "prompt_length": 8}
RECIPE = {
    "source": "base/tiny", "method": "resp", "sparsity": 0.5, "steps": 2, "scope": "row", "calibration": OWN,
}  # fmt: skip


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_the_mask_grows_and_every_linear_meets_the_target(scope, workspace, monkeypatch):
    steps = []

    def watched(model, targets, windows, **options):
        steps.append(({linear.name: (linear.weight == 0).cpu() for linear in targets}, windows))
        return loss_gradients(model, targets, windows, **options)

    monkeypatch.setattr("stages.pruning.resp.loss_gradients", watched)
    do(params("llama", {"prune/made": RECIPE | {"sparsity": 0.6, "steps": 3, "scope": scope}}))
    pruned = linears(load("prune/made"))
    masks = [*(zeros for zeros, _ in steps), {linear.name: linear.weight == 0 for linear in pruned}]
    for before, after in pairwise(masks):
        assert all(after[name][mask].all() for name, mask in before.items())
    for number, zeros in enumerate(masks):
        assert all(int(m.sum()) == int(m.numel() * 0.2 * number + 1e-6) for m in zeros.values())
    if scope == "row":
        by_row = [(linear.weight == 0).sum(1) for linear in pruned]
        assert all(counts.max() - counts.min() <= 1 for counts in by_row)
    notes = record("prune/made")["notes"]["prune/made"]
    assert [tuple(step) for step in notes["steps"]] == [("loss", "sparsity")] * 3
    windows = [windows for _, windows in steps]
    assert torch.equal(windows[0][:, :8], windows[1][:, :8])
    assert torch.equal(windows[1][:, :8], windows[2][:, :8])
    assert not torch.equal(windows[0], windows[1]) and not torch.equal(windows[1], windows[2])


def test_zeros_of_a_source_stay_and_count(workspace):
    first = {
        "source": "base/tiny", "method": "magnitude", "sparsity": 0.3, "scope": "matrix", "calibration": NONE,
    }  # fmt: skip
    do(params("gpt2", {"prune/first": first, "prune/made": RECIPE | {"source": "prune/first"}}))
    assert record("prune/made")["sparsity"] == 0.5
    for before, after in zip(linears(load("prune/first")), linears(load("prune/made")), strict=True):
        assert (after.weight[before.weight == 0] == 0).all()
        assert torch.equal(after.weight[after.weight != 0], before.weight[after.weight != 0])


def test_text_the_model_did_not_write_is_refused():
    with pytest.raises(ValidationError, match="tokens is text, but resp is calibrated on text the model"):
        RESP(source="base/m", method="resp", sparsity=0.5, scope="row", calibration=TEXT)


def test_two_runs_are_the_same_bytes(workspace):
    other = RECIPE | {"calibration": OWN | {"seed": 1}}
    do(params("llama", {"prune/first": RECIPE, "prune/second": RECIPE, "prune/other": other}))
    first, second, third = (
        (workspace / "data" / "models" / "prune" / name / "model.safetensors").read_bytes()
        for name in ("first", "second", "other")
    )
    assert first == second != third
