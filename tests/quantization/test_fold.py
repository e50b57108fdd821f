"""Folding a scale into what feeds a group: the block computes what it did, and false feeds are seen."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, NemotronConfig, OPTConfig, PhiConfig, PreTrainedConfig

from stages.compress.walk import input_groups
from stages.core.errors import Refusal
from stages.model.blocks import blocks, linears
from stages.quantization.feeds import Norm, Rows, feeds
from stages.quantization.fold import fold
from tests import families

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
"""The first linear of each group and what feeds it; heads are grouped (4 queries, 2 keys and values)."""


class Held:
    """The first block of a model, its groups, and a function that runs it on the arguments it is given."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.model = model.to(dtype)
        self.name, self.block = blocks(self.model)[0]
        calls: list[Any] = []
        handle = self.block.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        tokens = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            self.model(input_ids=tokens, use_cache=False)
        handle.remove()
        ((self.args, self.kwargs),) = calls
        found = [one for one in linears(self.model) if one.block == self.name]
        self.groups = input_groups(self.block, found, self)

    def __call__(self) -> torch.Tensor:
        with torch.no_grad():
            output = self.block(*self.args, **self.kwargs)
        return output if isinstance(output, torch.Tensor) else output[0]

    def feeds(self) -> dict[str, Any]:
        with torch.no_grad():
            found = feeds(self.groups, self)
        local = [group.linears[0].name.removeprefix(f"{self.name}.") for group in self.groups]
        return dict(zip(local, found, strict=True))

    def names(self) -> dict[str, str | None]:
        called = {module: name for name, module in self.block.named_modules()}
        return {group: feed and called[feed.module] for group, feed in self.feeds().items()}


def shaken(family: str, **settings: Any) -> nn.Module:
    """A model of the family whose norms and biases are not the ones and zeros they start from."""
    made = families.model(family)
    if settings:
        config = copy.deepcopy(families.CONFIGS[family])
        config.update(settings)
        torch.manual_seed(0)
        made = type(made)(config).eval()
    draw = torch.Generator().manual_seed(1)
    for _, parameter in made.named_parameters():
        if parameter.ndim == 1:
            parameter.data += (torch.randn(parameter.shape, generator=draw) / 4).to(parameter.dtype)
    return made


def scales(width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed)).exp()


@pytest.mark.parametrize("family", families.CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_feeds_each_group(family, dtype):
    assert Held(shaken(family), dtype).names() == FEEDS[family]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3"])
def test_with_as_many_value_heads_as_queries_values_feed_the_output(family):
    assert Held(shaken(family, **HEADS)).names() == FEEDS[family] | {OUT: "self_attn.v_proj"}


def configured(kind: type[PreTrainedConfig], **settings: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 259}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**sizes, **families._IDS, **settings)).eval()


def test_families_of_other_shapes():
    after = configured(OPTConfig, ffn_dim=64, word_embed_proj_dim=32, do_layer_norm_before=False)
    assert Held(after).names() == {  # its norms write the residual stream
        QKV: None, "self_attn.out_proj": "self_attn.v_proj", "fc1": None, "fc2": "fc1",
    }  # fmt: skip
    parallel = configured(PhiConfig, intermediate_size=64)
    assert Held(parallel).names() == {  # one norm feeds q, k, v and fc1
        QKV: "input_layernorm", "self_attn.dense": "self_attn.v_proj", "mlp.fc2": None,
    }  # fmt: skip
    biased = configured(NemotronConfig, intermediate_size=64, head_dim=8, num_key_value_heads=4)
    feed = Held(biased).feeds()[QKV]  # LayerNorm with 1 + weight, and a bias; its MLP is a squared ReLU
    assert feed.origin == 1
    assert Held(biased).names()["mlp.down_proj"] is None


def test_what_it_finds_is_of_the_kind_it_says():
    gemma, llama = Held(shaken("gemma3", **HEADS)).feeds(), Held(shaken("llama")).feeds()
    assert gemma[QKV].origin == 1
    assert llama[QKV].origin == 0
    assert isinstance(gemma[QKV], Norm)
    assert isinstance(gemma[OUT], Rows)


@pytest.mark.parametrize("family", families.CONFIGS)
def test_the_block_computes_what_it_did(family):
    settings = HEADS if family in ("llama", "qwen3", "mistral", "gemma3") else {}
    held = Held(shaken(family, **settings))
    before, weights = held(), {n: p.clone() for n, p in held.block.named_parameters()}
    found = held.feeds()
    for seed, (group, feed) in enumerate(zip(held.groups, found.values(), strict=True)):
        if feed is not None:
            fold(group, feed, feed.reachable(scales(group.inputs.shape[-1], seed)))
            torch.testing.assert_close(held(), before, rtol=1e-4, atol=1e-5)
    changed = {f"{held.name}.{n}" for n, p in held.block.named_parameters() if not torch.equal(p, weights[n])}
    for group, feed in zip(held.groups, found.values(), strict=True):
        for linear in group.linears if feed else ():
            assert f"{linear.name}.weight" in changed


@pytest.mark.parametrize("family", families.CONFIGS)
def test_the_inputs_arrive_divided_and_zeros_stay(family):
    held = Held(shaken(family))
    masks = {one.name: torch.rand(one.weight.shape) < 0.3 for group in held.groups for one in group.linears}
    for group in held.groups:
        for one in group.linears:
            one.weight[masks[one.name]] = 0
    held = Held(held.model)
    for group, feed in zip(held.groups, held.feeds().values(), strict=True):
        if feed is not None:
            before = group.inputs.clone()
            scale = feed.reachable(scales(group.inputs.shape[-1]))
            fold(group, feed, scale)
            again = next(
                new for new in Held(held.model).groups if new.linears[0].name == group.linears[0].name
            )
            torch.testing.assert_close(again.inputs, before / scale, rtol=1e-4, atol=1e-6)
            held = Held(held.model)
    for group in held.groups:
        for one in group.linears:
            assert torch.equal(one.weight == 0, masks[one.name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["gemma3", "llama", "opt"])
def test_linears_are_multiplied_by_what_the_norm_was_really_divided_by(family, dtype):
    """Gemma's 1 + weight can be stored only coarsely near 0; the product of both must not suffer."""
    held = Held(shaken(family), dtype)
    feed = held.feeds()[QKV]
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
    coarse = (scale / wanted - 1).abs().max()
    assert (coarse > 0.1) == (family == "gemma3" and dtype == torch.bfloat16)


def test_a_channel_gemma_would_lose_keeps_its_weight():
    norm = Held(shaken("gemma3"), torch.bfloat16).feeds()[QKV]
    scale = norm.reachable(torch.full((32,), 1e6))
    assert torch.equal(scale, torch.ones(32))


def reader(change: str) -> nn.Module:
    """A Llama's model with something beside the linears reading what feeds them."""
    model = shaken("llama", **HEADS)
    block = model.model.layers[0]
    forward, weight = block.mlp.forward, torch.randn(32, 32) / 1000
    if change == "stream":  # as where a norm stands behind the sum
        block.mlp.forward = lambda x: forward(x) + x
    if change == "linear":  # as where a recipe ignores one
        block.mlp.forward = lambda x: forward(x) + x @ weight
    if change == "twice":
        block.post_attention_layernorm = block.input_layernorm
    return model


@pytest.mark.parametrize(
    ("change", "lost"),
    [("stream", {"mlp.gate_proj"}), ("linear", {"mlp.gate_proj"}), ("twice", {QKV, "mlp.gate_proj"})],
)
def test_a_feed_that_something_else_reads_is_none(change, lost):
    names = Held(reader(change)).names()
    assert {group for group, feed in names.items() if feed is None} == lost
    assert len(names) == 4


@pytest.mark.parametrize("bend", [lambda x: x.relu().square(), lambda x: x.clamp(-0.01, 0.01), torch.tanh])
def test_what_is_bent_on_its_way_feeds_nothing(bend):
    class Bent(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return bend(x)

    model = shaken("opt")
    blocks(model)[0][1].activation_fn = Bent()
    assert Held(model).names()["fc2"] is None


def test_part_of_a_group_is_not_folded():
    """With v left alone by the recipe, a scale for q and k would reach v too."""
    held = Held(shaken("llama"))
    held.groups[0].linears.pop()
    assert held.feeds()[QKV] is None


def test_no_hook_and_no_change_is_left():
    held = Held(shaken("llama"))
    before = {n: p.clone() for n, p in held.block.named_parameters()}
    held.feeds()
    assert all(torch.equal(p, before[n]) for n, p in held.block.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in held.model.modules())


def test_a_scale_the_dtype_cannot_hold_is_refused():
    held = Held(shaken("llama"), torch.float16)
    feed = held.feeds()["mlp.down_proj"]
    with pytest.raises(Refusal, match=r"^folding .* leaves the range of torch\.float16; run in bfloat16"):
        fold(held.groups[3], feed, torch.full((64,), 1e8))
