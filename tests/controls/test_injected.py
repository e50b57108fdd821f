"""Rounding noise after every block: its size, and that nothing but values and seed decide it."""

import pytest
import torch

from stages.controls.candidates import Injected
from stages.controls.injected import inject, with_noise
from stages.core.numbers import generator
from tests import families

SIZE = 2.0**-9


def keys(features: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2**32, (features,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_has_the_size_asked_for_also_where_the_result_is_rounded(dtype, device):
    values = torch.randn(512, 64, generator=generator("values")).to(device, dtype)
    noisy = with_noise(values, keys(64).to(device), SIZE)
    assert noisy.dtype == dtype
    share = ((noisy.double() - values.double()) / values.double()).cpu()
    assert float(share.square().mean().sqrt()) == pytest.approx(SIZE, rel=0.1)
    assert abs(float(share.mean())) < SIZE / 50 and float(share.abs().max()) < 5 * SIZE
    if dtype == torch.float32:
        left, right = share[:, :-1].flatten(), share[:, 1:].flatten()
        assert abs(float(torch.corrcoef(torch.stack([left, right]))[0, 1])) < 0.02


def test_a_value_has_its_noise_whatever_lies_beside_it(device):
    values = torch.randn(8, 5, 64, generator=generator("values")).to(device)
    draw = keys(64).to(device)
    whole = with_noise(values, draw, SIZE)
    assert torch.equal(whole[3:5, 1:2], with_noise(values[3:5, 1:2], draw, SIZE))
    assert not torch.equal(whole, with_noise(values, keys(64, seed=1).to(device), SIZE))
    edges = torch.tensor([0.0, torch.inf, torch.nan], device=device)
    assert with_noise(edges, keys(3).to(device), SIZE).cpu().tolist()[:2] == [0.0, torch.inf]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_block_adds_noise_of_its_own(family):
    ids = families.windows(3, 12)
    plain = families.wide(family)(input_ids=ids, output_hidden_states=True).hidden_states
    again = []
    for seed in (0, 0, 1):
        model = families.wide(family)
        inject(model, Injected(size=SIZE, seed=seed))
        again.append(model(input_ids=ids, output_hidden_states=True))
        alone = model(input_ids=ids[1:2]).logits
        torch.testing.assert_close(alone, again[-1].logits[1:2], rtol=SIZE, atol=SIZE)
    assert torch.equal(again[0].logits, again[1].logits)
    assert not torch.equal(again[0].logits, again[2].logits)
    assert torch.equal(again[0].hidden_states[0], plain[0])
    moved = (again[0].hidden_states[1] / plain[1] - 1).abs()
    assert 0.5 * SIZE < float(moved.median()) < 1.5 * SIZE
