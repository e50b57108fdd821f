"""Removal of blocks: the rest reloads and generates with a cache, or the family is refused."""

import copy
import math
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma4TextConfig,
    GPTNeoConfig,
    GraniteMoeHybridConfig,
    Mamba2Config,
)

from stages.core.errors import Refusal
from stages.model.blocks import blocks
from stages.pruning.depth.remove import remove_blocks
from tests import families
from tests.deep import WINDOWS, deep, logits, without

pytestmark = [pytest.mark.numerics, pytest.mark.device]


def generated(model: torch.nn.Module, *, cache: bool) -> torch.Tensor:
    prompts = WINDOWS.to(model.device)
    return model.generate(
        prompts, attention_mask=torch.ones_like(prompts), use_cache=cache, do_sample=False,
        min_new_tokens=20, max_new_tokens=20,
    )  # fmt: skip


@pytest.mark.parametrize("family", families.CONFIGS)
def test_the_rest_reloads_and_generates_the_same_with_and_without_a_cache(family, tmp_path):
    model = deep(family)
    expected = logits(without(model, {1, 3}))
    remove_blocks(model, {1, 3})
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval().to(model.device)
    assert torch.equal(logits(reloaded), expected)
    assert reloaded.config.num_hidden_layers == 4
    for number, (_, block) in enumerate(blocks(reloaded)):
        assert {m.layer_idx for m in block.modules() if hasattr(m, "layer_idx")} == {number}
    if family == "gemma3":
        kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        assert reloaded.config.layer_types == kinds
    for candidate in (model, reloaded):
        tokens = generated(candidate, cache=True)
        assert torch.equal(tokens, generated(candidate, cache=False))
        with torch.no_grad():
            cache, steps = None, []
            for column in WINDOWS.to(model.device).split(1, dim=1):
                step = candidate(input_ids=column, past_key_values=cache, use_cache=True)
                cache, steps = step.past_key_values, [*steps, step.logits]
        assert torch.allclose(torch.cat(steps, 1).cpu(), expected, atol=1e-3)
        assert len(set(tokens[:, 24:].flatten().tolist())) >= 4


RECURRENT = {
    "falcon_h1": FalconH1Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8,
        mamba_n_groups=1, mamba_chunk_size=8,
    ),
    "granitemoehybrid": GraniteMoeHybridConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, shared_intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["mamba", "attention", "mamba"],
        num_local_experts=0, num_experts_per_tok=0, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8,
        mamba_n_groups=1, mamba_chunk_size=8,
    ),
    "mamba2": Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_heads=8, head_dim=8, state_size=8, n_groups=1,
        chunk_size=8, expand=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", RECURRENT)
def test_settings_that_json_cannot_hold_are_read_as_from_a_file(family, tmp_path):
    """Their config has an infinity, which is written as `{"__float__": "Infinity"}`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(RECURRENT[family])).eval()
    remove_blocks(model, {2})
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert reloaded.config.num_hidden_layers == 2 and reloaded.config.time_step_limit[1] == math.inf
    with torch.no_grad():
        windows = WINDOWS % 64
        assert torch.equal(model(windows).logits, reloaded(windows).logits)


def gemma4(**settings: Any) -> torch.nn.Module:
    """Four blocks, whose full attention has heads of another width: a setting by layer."""
    usual = {"hidden_size_per_layer_input": 0, "layer_types": ["sliding_attention", "full_attention"] * 2}
    config = Gemma4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, global_head_dim=16, sliding_window=16, **usual | settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("removed", [{0}, {1}, {2, 3}])
def test_settings_by_layer_move_with_their_layers(removed, tmp_path):
    model, windows = gemma4(), WINDOWS % 64
    remove_blocks(model, removed)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(windows).logits, reloaded(windows).logits)


CURES = {
    "qwen3_5": ({1}, "no block of type full_attention would be left: list one of 1 in keep"),
    "per-layer input": ({0}, "its embedding holds a part for each block: use another method"),
}


@pytest.mark.parametrize("case", CURES)
def test_a_refusal_says_which_blocks_to_keep(case):
    if case == "qwen3_5":
        model = families.wide("qwen3_5")
    else:
        model = gemma4(hidden_size_per_layer_input=16, vocab_size_per_layer_input=64)
    removed, cure = CURES[case]
    with pytest.raises(Refusal, match=f"without these blocks: .*; {cure}.$"):
        remove_blocks(model, removed)


def test_a_model_that_its_config_cannot_describe_is_refused():
    model = deep("gpt2", 4, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(Refusal, match=r"config of GPT2LMHeadModel cannot describe .*attn\.scaling"):
        remove_blocks(model, {1})


def test_cache_places_that_cannot_be_renumbered_are_refused():
    config = GPTNeoConfig(
        vocab_size=259, hidden_size=32, num_layers=4, num_heads=4, attention_types=[[["global"], 4]],
        max_position_embeddings=64, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    with pytest.raises(Refusal, match=r"config of GPTNeoForCausalLM cannot describe .*layer_id"):
        remove_blocks(AutoModelForCausalLM.from_config(config), {1})
