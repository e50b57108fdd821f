"""The mean update of a removed block, kept as a bias (2407.16286).

x -> x + f(x) becomes x -> x + E f(x), with the mean over all calibration tokens of the dense model. That
mean is a constant, so it is added to a bias that ends in the residual stream: of the last block that remains
before the removed one or, for a removed attention, of its own output projection. Which linear of a block has
such a bias is found by changing it. A family without biases may have a setting for them, as Llama has
`mlp_bias` and `attention_bias`: it is switched on, and the biases that it adds are zero but for the means.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.model.blocks import blocks, forward, linears
from stages.pruning.depth.observe import observe, stream_out
from stages.pruning.depth.remove import Target, attention_of, output_projections

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def make_biases(model: PreTrainedModel, target: Target) -> dict[str, str]:
    """Make sure that biases can hold a mean: the model's own, or zeros that a setting of its config adds.

    Returns:
        For the record, the setting that was switched on; empty if the model has such biases.

    Raises:
        Refusal: the family has no such bias.
    """
    if target == "attention":
        _check_nothing_follows(model)
    refusal = _lacks_bias(model, target)
    if refusal is None:
        return {}
    settings = vars(model.config.get_text_config())
    for key in [key for key, value in settings.items() if "bias" in key and value is False]:
        added = _add_biases(model, key)
        if added and _lacks_bias(model, target) is None:
            return {"bias_setting": key}
        _drop_biases(model, key, added)
    raise refusal


def _lacks_bias(model: PreTrainedModel, target: Target) -> Refusal | None:
    """Return the refusal of a model without a bias that can hold a mean, None if it has one."""
    if target == "block":
        try:
            stream_bias(model, 0)
        except Refusal as refusal:
            return refusal
        return None
    if lacking := [linear.name for linear in output_projections(model) if linear.module.bias is None]:
        return Refusal(
            f"replace_by_mean: {type(model).__name__} has no bias in {lacking[0]} to hold the mean of an "
            "attention, and no setting of its config adds one; leave replace_by_mean out."
        )
    return None


def _check_nothing_follows(model: PreTrainedModel) -> None:
    """Refuse a family that passes the output of its attention through a norm."""
    name, block = blocks(model)[0]
    attention = attention_of(name, block)
    outputs: list[Tensor] = []
    readers: list[str] = []

    def look(module: nn.Module, args: Any) -> None:
        if outputs and args and args[0] is outputs[0] and not isinstance(module, torch.nn.Dropout):
            readers.append(type(module).__name__)

    with ExitStack() as hooks:
        hooks.enter_context(
            attention.register_forward_hook(lambda _, __, output: outputs.append(stream_out(output)))
        )
        for child in block.children():
            hooks.enter_context(child.register_forward_pre_hook(look))
        forward(model, torch.zeros(1, 2, dtype=torch.long))
    if readers:
        raise Refusal(
            f"replace_by_mean: {type(model).__name__} has no bias in {name} that adds the mean of an "
            f"attention, as {readers[0]} follows it; leave replace_by_mean out."
        )


def _add_biases(model: PreTrainedModel, key: str) -> list[nn.Module]:
    """Set the config's `key` and give the linears the zero biases that it adds; return these linears.

    Nothing is changed, and none returned, if the setting adds anything else.
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM

    config: Any = copy.deepcopy(model.config)
    setattr(config.get_text_config(), key, True)
    with init_empty_weights():
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    new = shapes.keys() - model.state_dict().keys()
    biases = {f"{linear.name}.bias": linear.module for linear in linears(model, partial=True)}
    if not new <= biases.keys():
        return []
    for name in new:
        weight: Any = biases[name].weight
        zeros = torch.zeros(shapes[name], dtype=weight.dtype, device=weight.device)
        biases[name].register_parameter("bias", torch.nn.Parameter(zeros, requires_grad=False))
    model.config = config  # the old one may be shared with another model
    return [biases[name] for name in new]


def _drop_biases(model: PreTrainedModel, key: str, added: list[nn.Module]) -> None:
    """Undo `_add_biases`."""
    for module in added:
        module.register_parameter("bias", None)
    if added:
        setattr(model.config.get_text_config(), key, False)


def mean_updates(
    model: PreTrainedModel, windows: Tensor, batch_size: int, target: Target
) -> dict[int, Tensor]:
    """Return E f(x) over all tokens, `[hidden]` fp64 on the CPU, by block number.

    For an attention it is the mean of the output of its output projection.
    """
    sums: dict[int, Tensor] = {}

    def add(number: int, values: Tensor) -> None:
        total = values.double().flatten(0, -2).sum(0).cpu()
        sums[number] = sums[number] + total if number in sums else total

    def add_block(number: int, before: Tensor, after: Tensor) -> None:
        if target == "block":
            add(number, after.double() - before.double())

    with ExitStack() as hooks:
        for number, linear in enumerate(output_projections(model) if target == "attention" else ()):
            hooks.enter_context(
                linear.module.register_forward_hook(lambda _, __, output, number=number: add(number, output))
            )
        observe(model, windows, batch_size, "block", add_block, "mean update")
    return {number: total / windows.numel() for number, total in sums.items()}


def add_to_biases(model: PreTrainedModel, removed: tuple[int, ...], means: dict[int, Tensor]) -> None:
    """Add the mean update of each block to be removed to a bias of the last remaining block before it.

    Args:
        removed: without block 0.
    """
    for number in removed:
        before = max(set(range(number)) - set(removed))
        bias = stream_bias(model, before)
        bias.copy_(bias.double() + means[number].to(bias.device))


def stream_bias(model: PreTrainedModel, number: int) -> Tensor:
    """Return the last bias of a block, `[hidden]`, that adds directly to the output of the block.

    Raises:
        Refusal: there is none.
    """
    name, block = blocks(model)[number]
    before = _output(model, block)
    step = torch.ones_like(before[0, 0]) * before.abs().max().clamp(min=1)
    for linear in reversed([linear for linear in linears(model, partial=True) if linear.block == name]):
        parameter: Any = linear.module.bias
        if parameter is None or parameter.shape != step.shape:
            continue
        bias: Tensor = parameter.data
        original = bias.clone()
        bias.add_(step)
        change = _output(model, block) - before
        bias.copy_(original)
        if torch.allclose(change, step.expand_as(change), rtol=0.05):
            return bias
    raise Refusal(
        f"replace_by_mean: {type(model).__name__} has no bias in {name} that adds to the residual stream and "
        "could hold a mean update, and no setting of its config adds one; leave replace_by_mean out."
    )


def _output(model: PreTrainedModel, block: nn.Module) -> Tensor:
    """Return the output of a block for two tokens, `[1, 2, hidden]`."""
    outputs: list[Tensor] = []
    with block.register_forward_hook(lambda _, __, output: outputs.append(stream_out(output))):
        forward(model, torch.zeros(1, 2, dtype=torch.long))
    return outputs[0].clone()
