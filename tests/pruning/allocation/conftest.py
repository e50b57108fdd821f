"""A model whose blocks differ."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.model.blocks import linears
from tests import families


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """Six blocks that differ in the size, the outliers and the spectra of their weights."""
    torch.manual_seed(0)
    config = copy.deepcopy(families.CONFIGS["llama"])
    config.num_hidden_layers = 6
    llama = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for number, linear in enumerate(linears(llama)):
        block = int(linear.block.rpartition(".")[2])
        draw = torch.Generator().manual_seed(number)
        outliers = torch.rand(linear.weight.shape, generator=draw) < 0.01 * (block % 4)
        linear.weight.mul_(1 + 30 * outliers)
        linear.weight.mul_(torch.linspace(1, 4 + 3 * block, len(linear.weight))[:, None])
    return llama.to(families.DEVICE)
