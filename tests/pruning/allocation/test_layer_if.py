"""LayerIF: the published formulas, worked out by hand."""

import pytest
import torch
from pydantic import ValidationError
from scipy.signal import savgol_filter

from stages.corpus.windows import Tokens
from stages.model.blocks import blocks
from stages.pruning.allocation import layer_if
from stages.pruning.allocation.layer_if import influence
from stages.pruning.gradients import sketches
from tests.allocations import allocation, by_block, shares, tokens
from tests.families import DEVICE

pytestmark = [pytest.mark.numerics, pytest.mark.device]


def slow_influence(train: torch.Tensor, held_out: torch.Tensor) -> float:
    """DataInf (2310.00902), equation 5, term by term."""
    n, d = train.shape
    damping = 0.1 * sum(float(g @ g) / d for g in train) / n
    v, total = held_out.mean(0), 0.0
    for k in range(n):
        terms = [(v @ train[k] - (v @ g) * (g @ train[k]) / (damping + g @ g)) / damping for g in train]
        total += max(0.0, float(sum(terms)) / n)
    return total


@pytest.mark.parametrize("seed", range(5))
def test_influence_is_datainfs(seed):
    draw = torch.Generator().manual_seed(seed)
    vectors = torch.randn(8, 20, generator=draw, dtype=torch.float64).to(DEVICE) + torch.randn(
        20, generator=draw
    ).to(DEVICE)
    assert influence(vectors, 20) == pytest.approx(slow_influence(vectors[:4], vectors[4:]))


def test_a_helpful_half_has_more_influence_than_a_harmful_one():
    g = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    noise = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 0.1
    helpful, harmful = torch.cat([g + noise, g + noise]), torch.cat([g + noise, -g + noise])
    assert influence(helpful, 50) > influence(harmful, 50)


def exact_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return each window's whole gradient in each block, `[windows, parameters of the block]`."""
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name, _ in blocks(model)}
    model.requires_grad_(True)
    for window in tokens():
        model.zero_grad()
        model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
        for name, block in blocks(model):
            gradients[name].append(torch.cat([p.grad.flatten() for p in block.parameters()]).double())
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return {name: torch.stack(rows) for name, rows in gradients.items()}


def test_sketches_keep_dot_products(model):
    gradients = exact_gradients(model)
    small = sketches(model, tokens(), list(gradients))
    for name, exact in gradients.items():
        scale = exact.norm(dim=1).max() ** 2
        assert (small[name].double() @ small[name].double().T - exact @ exact.T).abs().max() < 0.05 * scale


def test_layer_if_is_the_papers_formula(model, monkeypatch):
    exact = exact_gradients(model)
    monkeypatch.setattr(layer_if, "sketches", lambda _, __, names: {name: exact[name] for name in names})
    result = by_block(model, shares("layer-if", model, 0.5))
    scores = torch.tensor(
        [slow_influence(exact[name][:3], exact[name][3:]) for name, _ in blocks(model)], device=DEVICE
    )
    scores = ((scores - scores.min()) / (scores.max() - scores.min())).cpu().numpy()
    smooth = savgol_filter(scores, 5, 2).clip(0, 1)
    raw = (1 - smooth) * (0.40 - 0.05) + 0.05
    expected = raw * 0.5 / raw.mean()
    if expected.max() <= 1:
        assert result == pytest.approx(expected.tolist(), rel=1e-4)
    else:  # a block cannot lose more than everything, so the rest is spread over the others
        assert max(result) == 1 and sum(result) / len(result) == pytest.approx(0.5)


def test_low_must_be_below_high():
    with pytest.raises(ValidationError, match=r"low must be below high; got 0\.5 and 0\.4"):
        allocation("layer-if", low=0.5)


def test_windows_must_be_two_and_batches_must_be_used():
    chosen = allocation("layer-if")
    with pytest.raises(ValueError, match="layer-if needs num_samples of 2 or more"):
        chosen.check(Tokens(dataset="news", num_samples=1), by_row=False, batched=True)
    batches = Tokens(dataset="news", batch_size=2)
    with pytest.raises(ValueError, match="takes one window at a time; leave batch_size out"):
        chosen.check(batches, by_row=False, batched=False)
    chosen.check(batches, by_row=False, batched=True)
