"""Positions: every family says how many tokens it reads, or reads more than any other."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MptConfig

from stages.core.errors import Refusal
from stages.evaluation.shared import SharedPrefixLM
from stages.model.blocks import check_length, forward
from stages.model.positions import most_tokens, most_tokens_of, sharing, switch_lengths
from tests import families, generators

NAMES = sorted({*families.ALL, *generators.NAMES})
LONG = 300
"""Tokens of a row; families with a bound read 256, or 2048."""


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_is_not_refused_is_read(name):
    model = generators.model(name) if name in generators.NAMES else families.wide(name)
    limit = most_tokens(model.config)
    assert limit is None or limit > 0
    if limit is None or limit >= LONG:
        forward(model, families.windows(1, LONG))
    else:
        with pytest.raises(Refusal, match=rf"^sequence_length {LONG} is more than the {limit} tokens"):
            check_length(model, families.windows(1, LONG))


def test_the_bound_of_mpt_is_that_of_its_biases():
    config = MptConfig(
        vocab_size=families.VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, **families._IDS
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert most_tokens(config) == 64
    assert SharedPrefixLM(pretrained=model, tokenizer=families.tokenizer()).max_length == 64
    forward(model, families.windows(1, 64))
    with pytest.raises(RuntimeError):
        forward(model, families.windows(1, 65))


def test_a_bound_of_minus_one_is_none():
    assert most_tokens(AutoConfig.for_model("xlnet")) is None


def test_only_rows_on_one_side_of_a_switch_share_a_forward():
    sizes = [5, 30, 20, 21]
    config = generators.model("phi3").config
    assert switch_lengths(config) == (20,)
    assert sharing(config, sizes) == [[0, 2], [1, 3]]
    assert sharing(families.CONFIGS["llama"], sizes) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("family", ["gpt2", "mpt", "llama", "opt", "bloom"])
def test_a_config_on_disk_tells_the_same_bound(family):
    config = AutoConfig.for_model(family)
    assert most_tokens_of(config.to_dict()) == most_tokens(config)
