"""The mean update of a removed block or attention, against hooks on the dense model."""

from pathlib import Path

import pytest
import torch

from stages.core.errors import Refusal
from stages.corpus.windows import Windows, calibration_windows
from stages.model.blocks import blocks, forward
from stages.pruning.depth.mean import make_biases
from stages.pruning.depth.remove import output_projections
from tests import families
from tests.deep import deep, logits, without
from tests.pipeline import TEXT, load

pytestmark = [pytest.mark.numerics, pytest.mark.device]


def inputs_and_output(model: torch.nn.Module, module: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a module reads and returns for the calibration windows."""
    calls = []
    with module.register_forward_hook(lambda _, args, output: calls.append((args[0], output))):
        forward(model, calibration_windows(families.tokenizer(), Windows(**TEXT), families.VOCAB))
    (call,) = calls
    return call


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox", "llama"])
def test_a_block_leaves_its_mean_update(family, source, prune):
    model = source(deep(family))
    facts = prune(replace_by_mean=True, keep=(0, 3, 5), calibration=TEXT, blocks=3)
    assert facts["notes"]["prune/made"]["removed"] == [1, 2, 4]
    means = {}
    for number in (1, 2, 4):
        before, after = inputs_and_output(model, blocks(model)[number][1])
        means[number] = (after - before).mean((0, 1))
    expected = logits(without(model, {1, 2, 4}, means))
    assert torch.allclose(logits(load("prune/made")), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox", "llama", "qwen3"])
def test_an_attention_leaves_its_mean(family, source, prune):
    model = source(deep(family, 3))
    prune(replace_by_mean=True, target="attention", keep=(2,), blocks=1, calibration=TEXT)
    projection = output_projections(load("prune/made"))[1]
    _, output = inputs_and_output(model, output_projections(model)[1].module)
    assert not projection.weight.count_nonzero()
    assert torch.allclose(projection.module.bias.data, output.flatten(0, -2).mean(0).cpu(), atol=1e-5)


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("qwen3", "block"), ("gemma3", "block"), ("mistral", "block"), ("gemma3", "attention"),
        ("mistral", "attention"),
    ],
)  # fmt: skip
def test_a_family_without_such_a_bias_is_refused_by_name(family, target, source, prune):
    model = source(deep(family, 3))
    with pytest.raises(Refusal, match=f"{type(model).__name__} has no bias in .*leave replace_by_mean out"):
        prune(replace_by_mean=True, target=target, keep=(0,), blocks=1, calibration=TEXT)
    assert not Path("data/models/prune/made").exists()
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())


def test_a_setting_adds_biases_that_are_zero_but_for_the_mean(source, prune):
    model = source(deep("llama", 4))
    facts = prune(replace_by_mean=True, keep=(0,), blocks=1, calibration=TEXT)
    assert facts["notes"]["prune/made"]["removed"] == [3]
    assert facts["notes"]["prune/made"]["bias_setting"] == "mlp_bias"
    pruned = load("prune/made")
    assert pruned.config.mlp_bias and not pruned.config.attention_bias
    biases = {name: p for name, p in pruned.named_parameters() if name.endswith("bias")}
    assert len(biases) == 9  # gate, up and down of three blocks
    assert [name for name, p in biases.items() if p.count_nonzero()] == ["model.layers.2.mlp.down_proj.bias"]
    assert facts["num_parameters"] == sum(p.numel() for p in pruned.parameters())
    assert not torch.allclose(logits(pruned), logits(without(model, {3})), atol=1e-2)


def test_a_bias_before_a_norm_holds_no_mean():
    with pytest.raises(Refusal, match="OPTForCausalLM has no bias"):
        make_biases(deep("opt", 2, do_layer_norm_before=False), "block")
    assert make_biases(deep("llama", 2, mlp_bias=True), "block") == {}
