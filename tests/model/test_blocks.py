"""Blocks and linears: which there are, how they are stored, and which are refused by name."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XLMConfig,
    XLMWithLMHeadModel,
)
from transformers.pytorch_utils import Conv1D

from stages.core.errors import Refusal
from stages.model.blocks import blocks, linears
from tests import families
from tests.pipeline import NONE, TEXT, do, params

FAMILIES = list(families.CONFIGS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_linears_of_every_block_are_out_by_in(family):
    model = families.model(family)
    inside = linears(model)
    names = [name for name, _ in blocks(model)]
    assert len(names) == 2
    assert {linear.block for linear in inside} == set(names)
    assert len({linear.name for linear in inside}) == len(inside)
    assert sorted({linear.weight.shape[1] for linear in inside}) == families.IN_FEATURES[family]
    assert all(linear.transposed == isinstance(linear.module, Conv1D) for linear in inside)
    assert all(linear.transposed for linear in inside) == (family == "gpt2")
    for linear in inside:
        stored = tuple(linear.module.weight.shape)
        assert tuple(linear.weight.shape) == (stored[::-1] if linear.transposed else stored)
        linear.weight.zero_()
        assert not linear.module.weight.any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_weight_is_replaced_and_the_old_tensor_is_not_written_to(family):
    linear = linears(families.model(family))[0]
    before = linear.weight
    copy = before.clone()
    linear.put(new := before * 2 + 1)
    assert torch.equal(linear.weight, new) and torch.equal(before, copy)
    assert linear.weight.shape == copy.shape and linear.module.weight.is_contiguous()
    with pytest.raises(ValueError, match="not \\[3, 5\\]"):
        linear.put(torch.ones(3, 5))


def test_the_parts_of_a_block_in_several_lists_are_refused():
    config = XLMConfig(vocab_size=99, emb_dim=32, n_layers=2, n_heads=4, causal=True)
    with pytest.raises(Refusal, match=r"XLM\w+ keeps the parts of its 2 blocks in 4 lists \(trans"):
        blocks(XLMWithLMHeadModel(config))


def test_blocks_are_those_of_the_text_even_beside_a_larger_tower_of_as_many():
    config = copy.deepcopy(families.RARE["gemma3_wrapper"])
    config.vision_config.num_hidden_layers, config.vision_config.intermediate_size = 2, 512
    model = AutoModelForCausalLM.from_config(config)
    assert [name for name, _ in blocks(model)] == [f"model.language_model.layers.{n}" for n in range(2)]


def test_a_misspelt_ignore_is_refused():
    with pytest.raises(
        Refusal, match=r"ignore names mlp\.gate, which no block has; its linears are .*mlp\.gate_proj"
    ):
        linears(families.model("llama"), ("mlp.gate",))


def local_names(model: torch.nn.Module, ignore: tuple[str, ...] = ()) -> list[str]:
    """The block-relative names of a model's linears, sorted."""
    return sorted({linear.name.removeprefix(f"{linear.block}.") for linear in linears(model, ignore)})


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ignore_that_leaves_nothing_is_refused(family):
    model = families.model(family)
    names = local_names(model)
    assert local_names(model, tuple(names[1:])) == names[:1]
    with pytest.raises(Refusal, match=r"blocks is left to compress: ignore names .*; remove some of them"):
        linears(model, tuple(names))
    assert linears(model, tuple(names), partial=True) == []


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "magnitude", "scope": "global", "sparsity": 0.5, "calibration": NONE},
        {"method": "wanda", "sparsity": 0.5, "allocation": {"kind": "erk"}, "calibration": TEXT},
        {"method": "wanda", "sparsity": 0.5, "allocation": {"kind": "layer-if"}, "calibration": TEXT},
        {
            "method": "stepwise", "sparsity": 0.5, "max_rise": 1.0, "held_out": 1,
            "policy": {"kind": "rules"}, "calibration": TEXT,
        },
        {
            "method": "resp", "sparsity": 0.5, "scope": "row",
            "calibration": TEXT | {"tokens": "generated", "seed": 0, "temperature": 1.0, "prompt_length": 8},
        },
        {"method": "rtn", "bits": 4, "group_size": 32, "calibration": NONE},
        {
            "method": "lora", "train": TEXT, "rank": 2, "alpha": 4, "learning_rate": 0.01, "steps": 2,
            "batch_size": 2,
        },
    ],
    ids=lambda recipe: f"{recipe['method']}-{recipe.get('allocation', {}).get('kind', '')}",
)  # fmt: skip
def test_no_method_writes_an_uncompressed_copy(recipe, workspace):
    section = {"rtn": "quantize", "lora": "finetune"}.get(recipe["method"], "prune")
    names = local_names(families.model("llama"))
    recipe = recipe | {"source": "base/tiny", "ignore": names}
    with pytest.raises(Refusal, match="no linear of LlamaForCausalLM's blocks is left to compress"):
        do(params("llama", {f"{section}/none": recipe}))
    assert not Path("data/models", section).exists()


def test_the_experts_of_a_mixture_are_refused_by_name():
    model = families.mixture()
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
