"""The dry run: it finds MLPs and attentions of every family, and refuses blocks that are not plain."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Phi3Config

from stages.core.errors import Refusal
from stages.pruning.shape import anatomy
from tests import families
from tests.pipeline import NONE, do, load, params
from tests.shapes import grouped, logits, plan, width

GATED = ["gate_proj", "up_proj", "down_proj"]
MLPS = {"opt": ["fc1", "fc2"], "gpt_neox": ["dense_h_to_4h", "dense_4h_to_h"], "gpt2": ["c_fc", "c_proj"]}
ATTENTIONS = {
    "opt": ["k_proj", "v_proj", "q_proj", "out_proj"], "gpt_neox": ["query_key_value", "dense"],
    "gpt2": ["c_attn", "c_proj"],
}  # fmt: skip


def names(block: str, part: anatomy.Part) -> list[str]:
    return [linear.name.removeprefix(block).rpartition(".")[2] for linear in [*part.readers, part.writer]]


@pytest.mark.parametrize("family", families.CONFIGS)
def test_a_dry_run_finds_the_mlp(family):
    model = families.model(family)
    before = logits(model)
    for block, part in anatomy.mlps(model).items():
        assert names(block, part) == MLPS.get(family, GATED)
        assert part.width == (128 if family == "gpt2" else 64)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", families.CONFIGS)
def test_a_dry_run_finds_the_attention(family):
    for block, part in anatomy.attentions(families.model(family)).items():
        assert names(block, part) == ATTENTIONS.get(family, ["q_proj", "k_proj", "v_proj", "o_proj"])
        assert part.width == 32


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral"])
def test_independent_heads_reach_the_heads_of_their_group(family):
    model = grouped(family)
    reaches = anatomy.reach(model, anatomy.attentions(model), 4)
    expected = {"q_proj": 4, "k_proj": 8, "v_proj": 8}
    assert reaches == {
        f"model.layers.{number}.self_attn.{name}": expected[name] for number in range(2) for name in expected
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MixtralConfig, r"MixtralForCausalLM has matrices .*experts"),
        (Phi3Config, r"Phi3ForCausalLM: model\.layers\.0 has 0 MLPs with one feature per neuron; a"),
    ],
)
def test_blocks_that_are_not_plain_are_refused_by_name(config, message):
    """Experts that are no linears, and gate and up in one linear."""
    model = AutoModelForCausalLM.from_config(
        config(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, pad_token_id=0,
        )
    )  # fmt: skip
    with pytest.raises(Refusal, match=message):
        plan(width(remove=0.5), model)


def test_hidden_states_that_overflow_are_refused_and_not_taken_for_attention(workspace):
    do(params("llama", {}))
    model = load("base/tiny")
    model.model.layers[0].mlp.down_proj.weight.data.fill_(1e38)
    model.model.layers[0].post_attention_layernorm.weight.data.fill_(1e38)
    model.save_pretrained("data/models/base/tiny")
    recipe = {
        "source": "base/tiny", "method": "width", "importance": "ppm", "remove": 0.5, "calibration": NONE,
    }  # fmt: skip
    chosen = params("llama", {"prune/made": recipe})
    with pytest.raises(Refusal, match=r"NaN or infinite inputs of model\.layers\.1\.self_attn\.q_proj"):
        chosen.prune["made"].execute("prune/made", chosen.run)
    assert not Path("data/models/prune").exists()
