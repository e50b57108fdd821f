"""Models deep enough to lose blocks, and slow references for models without some blocks."""

import copy

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from stages.model.blocks import blocks
from stages.pruning.depth.remove import output_projections
from tests import families

WINDOWS = families.windows(5, 24, seed=7).cpu()  # a conftest imports this before the device is known


def deep(family: str, layers: int = 6, **more: object) -> nn.Module:
    """Make a model of `layers` blocks that change the residual stream a lot, in fp32."""
    settings = families.CONFIGS[family].to_dict() | {"num_hidden_layers": layers, "layer_types": None} | more
    if family == "gemma3":
        kinds = ["sliding_attention", "sliding_attention", "full_attention"]
        settings["layer_types"] = (kinds * layers)[:layers]
    if family not in ("gemma3", "qwen3"):
        settings.pop("layer_types")
    if family == "mistral":
        settings["sliding_window"] = 16
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(type(families.CONFIGS[family])(**settings), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().to(families.DEVICE)


class Skip(nn.Module):
    """A block that adds a constant to its input."""

    def __init__(self, plus: torch.Tensor | float = 0.0) -> None:
        super().__init__()
        self.plus = plus

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states + self.plus


def without(model: nn.Module, gone, plus=None) -> nn.Module:
    """Copy `model` with `Skip` in the place of the blocks `gone`: the slow reference."""
    reference = copy.deepcopy(model)
    name = blocks(reference)[0][0].rpartition(".")[0]
    for number in gone:
        reference.get_submodule(name)[number] = Skip(plus[number] if plus else 0.0)
    return reference


def without_attention(model: nn.Module, gone) -> nn.Module:
    """Copy `model` with zeroed output projections of attention in the blocks `gone`: the slow reference."""
    reference = copy.deepcopy(model)
    for number in gone:
        module = output_projections(reference)[number].module
        module.weight.data.zero_()
        if module.bias is not None:
            module.bias.data.zero_()
    return reference


def loss(model: nn.Module, windows: torch.Tensor = WINDOWS) -> float:
    with torch.no_grad():
        return sum(
            float(model(input_ids=row[None], labels=row[None], use_cache=False).loss)
            for row in windows.to(model.device)
        ) / len(windows)


def logits(model: nn.Module) -> torch.Tensor:
    """A model's logits by the CPU's kernels, wherever it lies, so that those of any two compare."""
    home = model.device
    with torch.no_grad():
        outputs = model.cpu()(input_ids=WINDOWS, use_cache=False).logits
    model.to(home)
    return outputs
