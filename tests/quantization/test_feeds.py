"""Which module feeds each group of linears, and that false feeds are recognized."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, NemotronConfig, OPTConfig, PhiConfig, PreTrainedConfig

from stages.compress.batches import BatchedCall
from stages.compress.capture import input_groups
from stages.model.blocks import Linear, blocks
from stages.quantization.feeds import LinearFeed, NormFeed, find_feeds
from tests import families
from tests.first_block import FirstBlock, scales, shaken

pytestmark = [pytest.mark.numerics, pytest.mark.device]
HEADS = {"num_key_value_heads": 4}
QKV, OUT = "self_attn.q_proj", "self_attn.o_proj"
GATED = {QKV: "input_layernorm", "mlp.gate_proj": "post_attention_layernorm", "mlp.down_proj": "mlp.up_proj"}
FEEDS: dict[str, dict[str, str | None]] = {
    "llama": {**GATED, OUT: None},
    "qwen3": {**GATED, OUT: None},
    "mistral": {**GATED, OUT: None},
    "gemma3": {**GATED, OUT: None, "mlp.gate_proj": "pre_feedforward_layernorm"},
    "opt": {
        QKV: "self_attn_layer_norm", "self_attn.out_proj": "self_attn.v_proj", "fc1": "final_layer_norm",
        "fc2": "fc1",
    },
    "gpt_neox": {
        "attention.query_key_value": "input_layernorm", "attention.dense": None,
        "mlp.dense_h_to_4h": "post_attention_layernorm", "mlp.dense_4h_to_h": None,
    },
    "gpt2": {"attn.c_attn": "ln_1", "attn.c_proj": None, "mlp.c_fc": "ln_2", "mlp.c_proj": None},
}  # fmt: skip
"""The first linear of each group and its feed; heads are grouped (4 queries, 2 keys and values)."""


@pytest.mark.parametrize("family", families.CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_feed_of_each_group(family, dtype):
    assert FirstBlock(shaken(family), dtype).names() == FEEDS[family]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3"])
def test_with_as_many_value_heads_as_queries_values_feed_the_output(family):
    assert FirstBlock(shaken(family, **HEADS)).names() == FEEDS[family] | {OUT: "self_attn.v_proj"}


def configured(kind: type[PreTrainedConfig], **settings: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 259}
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**sizes, **ids, **settings)).eval()


def test_families_of_other_shapes():
    after = configured(OPTConfig, ffn_dim=64, word_embed_proj_dim=32, do_layer_norm_before=False)
    assert FirstBlock(after).names() == {  # its norms write the residual stream
        QKV: None, "self_attn.out_proj": "self_attn.v_proj", "fc1": None, "fc2": "fc1",
    }  # fmt: skip
    parallel = configured(PhiConfig, intermediate_size=64)
    assert FirstBlock(parallel).names() == {  # one norm feeds q, k, v and fc1
        QKV: "input_layernorm", "self_attn.dense": "self_attn.v_proj", "mlp.fc2": None,
    }  # fmt: skip
    biased = configured(NemotronConfig, intermediate_size=64, head_dim=8, num_key_value_heads=4)
    feed = FirstBlock(biased).feeds()[QKV]  # LayerNorm with 1 + weight, and a bias; its MLP is a squared ReLU
    assert feed.origin == 1
    assert FirstBlock(biased).names()["mlp.down_proj"] is None


def test_norms_and_linears_become_feeds_of_their_kind():
    gemma, llama = FirstBlock(shaken("gemma3", **HEADS)).feeds(), FirstBlock(shaken("llama")).feeds()
    assert gemma[QKV].origin == 1
    assert llama[QKV].origin == 0
    assert isinstance(gemma[QKV], NormFeed)
    assert isinstance(gemma[OUT], LinearFeed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["gemma3", "llama", "opt"])
def test_the_reachable_scale_is_exactly_that_of_the_rounded_norm(family, dtype):
    """Gemma's 1 + weight is stored coarsely near 0; the product with the linears must not suffer."""
    first = FirstBlock(shaken(family), dtype)
    feed = first.feeds()[QKV]
    before = feed.module.weight.data.double() + feed.origin
    before[3] = 0
    feed.module.weight.data[3] = -feed.origin
    wanted = scales(32) * 20
    scale = feed.reachable(wanted)
    assert (scale > 0).all()
    assert torch.equal(feed.reachable(scale), scale)
    feed.divide(scale)
    after = feed.module.weight.data.double() + feed.origin
    torch.testing.assert_close(after * scale, before, rtol=1e-6, atol=0)
    largest_change = (scale / wanted - 1).abs().max()
    assert (largest_change > 0.1) == (family == "gemma3" and dtype == torch.bfloat16)


def test_a_channel_gemma_would_lose_keeps_its_weight():
    norm = FirstBlock(shaken("gemma3"), torch.bfloat16).feeds()[QKV]
    scale = norm.reachable(torch.full((32,), 1e6, device=families.DEVICE))
    assert (scale == 1).all()


def read_twice(change: str) -> nn.Module:
    """Make a Llama in which something beside the linears reads the output of their feed."""
    model = shaken("llama", **HEADS)
    block = model.model.layers[0]
    forward, weight = block.mlp.forward, torch.randn(32, 32).to(families.DEVICE) / 1000
    if change == "stream":  # as if the norm were after the sum
        block.mlp.forward = lambda x: forward(x) + x
    if change == "linear":  # as if a recipe ignored a linear
        block.mlp.forward = lambda x: forward(x) + x @ weight
    if change == "twice":
        block.post_attention_layernorm = block.input_layernorm
    return model


@pytest.mark.parametrize(
    ("change", "lost"),
    [("stream", {"mlp.gate_proj"}), ("linear", {"mlp.gate_proj"}), ("twice", {QKV, "mlp.gate_proj"})],
)
def test_a_module_with_another_reader_is_no_feed(change, lost):
    names = FirstBlock(read_twice(change)).names()
    assert {group for group, feed in names.items() if feed is None} == lost
    assert len(names) == 4


@pytest.mark.parametrize("bend", [lambda x: x.relu().square(), lambda x: x.clamp(-0.01, 0.01), torch.tanh])
def test_a_linear_before_an_activation_that_is_not_homogeneous_is_no_feed(bend):
    class Bent(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return bend(x)

    model = shaken("opt")
    blocks(model)[0][1].activation_fn = Bent()
    assert FirstBlock(model).names()["fc2"] is None


def test_part_of_a_group_has_no_feed():
    """If the recipe ignores v, a scale for q and k would reach v too."""
    first = FirstBlock(shaken("llama"))
    first.groups[0].linears.pop()
    assert first.feeds()[QKV] is None


def test_no_hook_and_no_change_is_left():
    first = FirstBlock(shaken("llama"))
    before = {n: p.clone() for n, p in first.block.named_parameters()}
    first.feeds()
    assert all(torch.equal(p, before[n]) for n, p in first.block.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in first.model.modules())


class Leaving(nn.Module):
    """An attention-like pair of linears that leaves its values for later blocks, if there is a place."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, shared: dict[str, torch.Tensor] | None) -> torch.Tensor:
        values = self.values(x)
        if shared is not None:
            shared["values"] = values
        return x + self.out(values)


@pytest.mark.parametrize("shares", [False, True])
def test_values_that_later_blocks_read_feed_more_than_the_output(shares):
    torch.manual_seed(0)
    block, x = Leaving(), torch.randn(1, 4, 8)
    call = (x,), {"shared": {} if shares else None}
    batches = BatchedCall(call, 1, 1, call)
    targets = [Linear("b", f"b.{name}", module, False) for name, module in block.named_children()]
    with torch.no_grad():
        groups = input_groups(block, targets, lambda: batches.run(block, 0))
        feeds = find_feeds(groups, lambda: batches.effects(block, 0))
    assert [feed and feed.module for feed in feeds] == [None, None if shares else block.values]
