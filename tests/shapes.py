"""Models that lose neurons or heads, and what they compute."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from stages.model.blocks import linears
from stages.pruning.shape.heads import Heads
from stages.pruning.shape.shrink import Cuts
from stages.pruning.shape.shrinker import Shrinker
from stages.pruning.shape.width import Width
from tests import families
from tests.pipeline import NONE

WINDOWS = families.windows(3, 24, seed=3)


def heads(**options: Any) -> Heads:
    options = {"importance": "magnitude", "calibration": NONE} | options
    return Heads(source="base/m", method="heads", **options)


def width(**options: Any) -> Width:
    options = {"importance": "ppm", "calibration": NONE} | options
    return Width(source="base/m", method="width", **options)


def plan(recipe: Shrinker, model: torch.nn.Module) -> tuple[Cuts, dict[str, int], dict[str, Any]]:
    """Plan a recipe that reads no text."""
    return recipe.plan(model, recipe.parts(model), {})


def full(family: str) -> torch.nn.Module:
    """A tiny model in fp32 whose linears all matter, with random biases: fresh ones are zero."""
    model = families.model(family).float()
    for linear in linears(model):
        linear.weight.mul_(8)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = (torch.randn(parameter.shape, generator=draw) / 4).to(parameter)
    return model


def grouped(family: str) -> PreTrainedModel:
    """Eight query heads of 4 features in four groups, in fp32; linears that all matter, with biases."""
    config = copy.deepcopy(families.CONFIGS[family])
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 8, 4, 4
    if hasattr(config, "attention_bias"):
        config.attention_bias = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for linear in linears(model):
        linear.weight.mul_(8)
        if linear.module.bias is not None:
            torch.nn.init.normal_(linear.module.bias, std=0.3)
    return model.to(families.DEVICE)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=WINDOWS).logits


def reloaded(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(families.DEVICE)
