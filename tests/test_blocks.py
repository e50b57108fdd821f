"""Blocks and linears: which there are, how they are stored, and what is refused by name."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from stages.core.blocks import blocks, linears
from stages.core.errors import Refusal
from tests import families

FAMILIES = list(families.CONFIGS)


def mixture() -> torch.nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(**families._GATED, num_local_experts=2, num_experts_per_tok=1)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def test_every_family_is_here():
    assert len(FAMILIES) == 7


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_of_every_block_out_by_in(family):
    model = families.model(family)
    found = linears(model)
    names = [name for name, _ in blocks(model)]
    assert len(names) == 2
    assert {linear.block for linear in found} == set(names)
    assert len({linear.name for linear in found}) == len(found)
    assert sorted({linear.weight.shape[1] for linear in found}) == families.IN_FEATURES[family]
    assert all(linear.transposed == isinstance(linear.module, Conv1D) for linear in found)
    assert all(linear.transposed for linear in found) == (family == "gpt2")
    for linear in found:
        stored = tuple(linear.module.weight.shape)
        assert tuple(linear.weight.shape) == (stored[::-1] if linear.transposed else stored)
        linear.weight.zero_()
        assert not linear.module.weight.any()


def test_a_misspelt_ignore_is_refused():
    with pytest.raises(
        Refusal, match=r"ignore names no matrix of a block: mlp\.gate; there are .*mlp\.gate_proj"
    ):
        linears(families.model("llama"), ("mlp.gate",))


def test_the_experts_of_a_mixture_are_refused_by_name():
    model = mixture()
    with pytest.raises(Refusal) as refusal:
        linears(model)
    stacked = [n for n, p in model.named_parameters() if p.ndim == 3]
    assert stacked
    for name in stacked:
        assert name in str(refusal.value)


def test_a_matrix_added_to_a_block_is_refused_by_name():
    model = families.model("llama")
    blocks(model)[1][1].mlp.gates = torch.nn.Parameter(torch.zeros(2, 8, 8))
    with pytest.raises(Refusal, match=r"model\.layers\.1\.mlp\.gates \(2, 8, 8\)"):
        linears(model)


def test_an_encoder_decoder_is_refused():
    config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(Refusal, match="T5ForConditionalGeneration is an encoder-decoder"):
        linears(T5ForConditionalGeneration(config))
