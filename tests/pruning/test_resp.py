"""RESP: only generated tokens count, the mask grows, exact counts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn import functional as F

from stages.compress.select import extend_by_row, extend_mask
from stages.core.errors import Refusal
from stages.model.blocks import linears
from stages.pruning.gradients import loss_gradients, mean_loss
from stages.pruning.resp import RESP
from tests import families
from tests.pipeline import TEXT, do, load, params, record

OWN = TEXT | {"tokens": "generated", "seed": 0, "temperature": 1.0, "prompt_length": 8}


def windows(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(seed))


def nats(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Of every token but the first, `[rows, tokens - 1]`, without the model's own loss."""
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(len(rows), -1)


@pytest.mark.parametrize("family", families.CONFIGS)
def test_gradients_are_those_of_the_loss_behind_the_prompt(family):
    model = families.model(family).float()
    found = linears(model)
    for prompt in (1, 9):
        model.requires_grad_(True)
        model.zero_grad()
        expected = nats(model, windows())[:, prompt - 1 :].mean()
        expected.backward()
        wanted = {one.name: one.module.weight.grad.clone() for one in found}
        model.zero_grad()
        gradients, loss = loss_gradients(model, found, windows(), prompt_length=prompt, label="test")
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert loss == pytest.approx(mean_loss(model, windows(), prompt), rel=1e-6)
        for one in found:
            stored = wanted[one.name].T if one.transposed else wanted[one.name]
            torch.testing.assert_close(gradients[one.name], stored, rtol=1e-3, atol=1e-7)
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_predicting_prompt_tokens_adds_nothing_but_their_own_loss():
    """The same windows, nothing changed but the mask: what differs is the prompt's part of the sum."""
    model = families.model("llama").float()
    found = linears(model)
    every, _ = loss_gradients(model, found, windows(), label="all")
    behind, _ = loss_gradients(model, found, windows(), prompt_length=9, label="generated")
    model.requires_grad_(True)
    nats(model, windows())[:, :8].mean().backward()
    for one in found:
        prompt = one.module.weight.grad
        torch.testing.assert_close(
            (every[one.name] * 23 - behind[one.name] * 15), prompt * 8, rtol=1e-3, atol=1e-5
        )
        assert not torch.allclose(every[one.name], behind[one.name])


def test_gradients_that_are_not_finite_are_refused():
    model = families.model("llama").float()
    linears(model)[0].weight[0, 0] = torch.nan
    with pytest.raises(Refusal, match=r"NaN or infinite gradients in model\.layers"):
        loss_gradients(model, linears(model), windows(), label="test")


@given(st.data())
def test_a_mask_grows_by_the_lowest_scores_to_an_exact_count(data):
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    values = st.lists(st.integers(0, 4), min_size=rows * columns, max_size=rows * columns)
    scores = torch.tensor(data.draw(values)).view(rows, columns).float()
    gone = torch.tensor(data.draw(values)).view(rows, columns) == 0
    count = data.draw(st.integers(0, rows * columns))
    for by_row in (True, False):
        made = extend_mask(scores.__getitem__, gone, count, by_row=by_row)
        assert made[gone].all()
        assert int(made.sum()) == max(count, int(gone.sum()))
        parts = zip(made, scores, gone, strict=True) if by_row else [(made, scores, gone)]
        for mask, score, had in parts:
            new, left = score[mask & ~had], score[~mask]
            assert not (new.numel() and left.numel()) or new.max() <= left.min()
    have, got = gone.sum(1), extend_by_row(scores.__getitem__, gone, count).sum(1)
    raised = got[got > have]
    assert not raised.numel() or int(raised.max()) <= int(got.min()) + 1


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_the_mask_grows_and_every_linear_meets_the_target(scope, workspace, monkeypatch):
    seen = []

    def watched(model, found, given, **options):
        seen.append(({one.name: one.weight == 0 for one in found}, given))
        return loss_gradients(model, found, given, **options)

    monkeypatch.setattr("stages.pruning.resp.loss_gradients", watched)
    recipe = {
        "source": "base/tiny",
        "method": "resp",
        "sparsity": 0.6,
        "steps": 3,
        "scope": scope,
        "calibration": OWN,
    }
    do(params("llama", {"prune/made": recipe}))
    made, told = load("prune/made"), record("prune/made")
    for before, after in zip(
        seen, [*seen[1:], ({one.name: one.weight == 0 for one in linears(made)}, None)], strict=True
    ):
        assert all(after[0][name][mask].all() for name, mask in before[0].items())
    for number, (masks, _) in enumerate(seen):
        assert all(int(m.sum()) == int(m.numel() * 0.2 * number + 1e-6) for m in masks.values())
    for one in linears(made):
        assert int((one.weight == 0).sum()) == int(one.weight.numel() * 0.6 + 1e-6)
        if scope == "row":
            by_row = (one.weight == 0).sum(1)
            assert by_row.max() - by_row.min() <= 1
    assert [tuple(step) for step in told["notes"]["prune/made"]["steps"]] == [("loss", "sparsity")] * 3
    prompts = [given[:, :8] for _, given in seen]
    assert torch.equal(prompts[0], prompts[1]) and torch.equal(prompts[1], prompts[2])
    assert not torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[1][1], seen[2][1])


def test_zeros_of_a_source_stay_and_count(workspace):
    pruned = {
        "source": "base/tiny",
        "method": "magnitude",
        "sparsity": 0.3,
        "scope": "matrix",
        "calibration": {"dataset": "none"},
    }
    recipe = {
        "source": "prune/first",
        "method": "resp",
        "sparsity": 0.5,
        "steps": 2,
        "scope": "row",
        "calibration": OWN,
    }
    do(params("gpt2", {"prune/first": pruned, "prune/made": recipe}))
    assert record("prune/made")["sparsity"] == 0.5
    for before, after in zip(linears(load("prune/first")), linears(load("prune/made")), strict=True):
        assert (after.weight[before.weight == 0] == 0).all()
        assert torch.equal(after.weight[after.weight != 0], before.weight[after.weight != 0])


def test_it_learns_from_what_the_model_says_or_not_at_all():
    with pytest.raises(ValidationError, match="tokens is text, but resp is calibrated on text the model"):
        RESP(source="base/m", method="resp", sparsity=0.5, scope="row", calibration=TEXT)


def test_two_runs_are_the_same_bytes(workspace):
    recipe = {
        "source": "base/tiny",
        "method": "resp",
        "sparsity": 0.5,
        "steps": 2,
        "scope": "row",
        "calibration": OWN,
    }
    other = recipe | {"calibration": OWN | {"seed": 1}}
    do(params("llama", {"prune/one": recipe, "prune/two": recipe, "prune/other": other}))
    one, two, third = (
        (workspace / "data" / "models" / "prune" / name / "model.safetensors").read_bytes()
        for name in ("one", "two", "other")
    )
    assert one == two != third
