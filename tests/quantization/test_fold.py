"""Folding a scale into the feed of a group: the block computes the same, and zeros stay zero."""

import pytest
import torch

from stages.core.errors import Refusal
from stages.quantization.fold import fold
from tests import families
from tests.first_block import FirstBlock, scales, shaken

pytestmark = [pytest.mark.numerics, pytest.mark.device]
HEADS = {"num_key_value_heads": 4}


@pytest.mark.parametrize("family", families.CONFIGS)
def test_the_block_computes_the_same(family):
    settings = HEADS if family in ("llama", "qwen3", "mistral", "gemma3") else {}
    first = FirstBlock(shaken(family, **settings))
    before, weights = first(), {n: p.clone() for n, p in first.block.named_parameters()}
    feeds = first.feeds()
    for seed, (group, feed) in enumerate(zip(first.groups, feeds.values(), strict=True)):
        if feed is not None:
            fold(group, feed, feed.reachable(scales(group.inputs.shape[-1], seed)))
            torch.testing.assert_close(first(), before, rtol=1e-4, atol=1e-5)
    changed = {
        f"{first.name}.{n}" for n, p in first.block.named_parameters() if not torch.equal(p, weights[n])
    }
    for group, feed in zip(first.groups, feeds.values(), strict=True):
        for linear in group.linears if feed else ():
            assert f"{linear.name}.weight" in changed


@pytest.mark.parametrize("family", families.CONFIGS)
def test_the_inputs_arrive_divided_and_zeros_stay(family):
    first = FirstBlock(shaken(family))
    masks = {
        linear.name: torch.rand(linear.weight.shape).to(linear.weight.device) < 0.3
        for group in first.groups
        for linear in group.linears
    }
    for group in first.groups:
        for linear in group.linears:
            linear.weight[masks[linear.name]] = 0
    first = FirstBlock(first.model)
    for group, feed in zip(first.groups, first.feeds().values(), strict=True):
        if feed is not None:
            before = group.inputs.clone()
            scale = feed.reachable(scales(group.inputs.shape[-1]))
            fold(group, feed, scale)
            after = next(
                new for new in FirstBlock(first.model).groups if new.linears[0].name == group.linears[0].name
            )
            torch.testing.assert_close(after.inputs, before / scale, rtol=1e-4, atol=1e-6)
            first = FirstBlock(first.model)
    for group in first.groups:
        for linear in group.linears:
            assert torch.equal(linear.weight == 0, masks[linear.name])


def test_a_scale_beyond_the_dtype_is_refused():
    first = FirstBlock(shaken("llama"), torch.float16)
    feed = first.feeds()["mlp.down_proj"]
    with pytest.raises(Refusal, match=r"^folding .* exceeds the range of torch\.float16"):
        fold(first.groups[3], feed, torch.full((64,), 1e8, device=families.DEVICE))
