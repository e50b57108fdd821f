"""Families that cannot have fewer heads, refused with the reason."""

import pytest
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    DiffLlamaConfig,
    FalconConfig,
    Gemma4UnifiedTextConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
)

from stages.core.errors import Refusal
from tests import families
from tests.shapes import grouped, heads, plan

pytestmark = [pytest.mark.numerics, pytest.mark.device]


def tiny(kind: type[PreTrainedConfig], queries: int, groups: int) -> PreTrainedModel:
    config = kind(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=queries,
        num_key_value_heads=groups, pad_token_id=0, head_dim=32 // queries,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_config_that_cannot_describe_fewer_heads(family, keep):
    model = families.model(family)
    message = (
        f"{type(model).__name__} cannot lose heads: its config cannot describe fewer heads of 8 features, "
        r"with which .* would be \[32, 32\] instead"
    )
    with pytest.raises(Refusal, match=message):
        plan(heads(keep=keep), model)


def test_a_number_that_the_config_refuses_comes_with_those_that_it_allows():
    with pytest.raises(Refusal, match=r"LlamaForCausalLM cannot have 6 heads: .*multiple.*; allowed: 2, 4\."):
        plan(heads(keep=6), grouped("llama"))
    _, changes, _ = plan(heads(keep=6), grouped("mistral"))
    assert changes["num_attention_heads"] == 6


def test_fused_heads_are_refused_by_name():
    fused = tiny(Phi3Config, 4, 2)
    with pytest.raises(Refusal, match=r"Phi3ForCausalLM cannot lose heads: .*qkv_proj holds more than"):
        plan(heads(keep=2), fused)


@pytest.mark.parametrize("unit", ["groups", "queries"])
@pytest.mark.parametrize(
    "shared", [{"multi_query": True}, {"new_decoder_architecture": True, "num_kv_heads": 2}]
)
def test_shared_keys_that_the_config_names_otherwise_are_refused_as_fused(shared, unit):
    config = FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, **shared
    )
    reason = r"FalconForCausalLM cannot lose heads: .*query_key_value holds more than the heads of only q"
    with pytest.raises(Refusal, match=reason):
        plan(heads(keep=2, unit=unit), AutoModelForCausalLM.from_config(config).eval())


def test_a_single_group_is_refused_with_what_can_be_removed():
    with pytest.raises(Refusal, match="share one key and value head; remove some with unit: queries"):
        plan(heads(keep=2), tiny(LlamaConfig, 4, 1))


def test_matrices_beside_linears_are_refused_without_advice_that_the_method_forbids():
    with pytest.raises(
        Refusal, match="cannot be removed beside them; use a method that has ignore"
    ) as refused:
        plan(heads(keep=2), families.mixture())
    assert "recipe's ignore" not in str(refused.value)


def test_blocks_with_other_numbers_of_heads_are_refused_by_name():
    """Such a config raises when it is asked for the number of all blocks."""
    config = Gemma4UnifiedTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, global_head_dim=8, num_global_key_value_heads=1, pad_token_id=0,
        attention_k_eq_v=True, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    message = "Gemma4UnifiedForCausalLM cannot lose heads: its config has num_key_value_heads by block"
    with pytest.raises(Refusal, match=message):
        plan(heads(remove=0.5), AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize("unit", ["groups", "queries"])
@pytest.mark.parametrize(("kind", "linear"), [(BitNetConfig, "[qkv]"), (DiffLlamaConfig, "[qv]")])
def test_heads_that_reach_each_other_are_refused_by_name(kind, linear, unit):
    family = kind.__name__.removesuffix("Config")
    name = rf"layers\.0\.self_attn\.{linear}_proj"
    message = rf"^{family}ForCausalLM cannot lose heads: the output of .*{name} for the first head reaches"
    with pytest.raises(Refusal, match=message):
        plan(heads(keep=4, unit=unit), tiny(kind, 8, 4))
