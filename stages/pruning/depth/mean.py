"""The mean update of a removed block, kept as a bias (2407.16286).

x -> x + f(x) becomes x -> x + E f(x), with the mean over all calibration tokens of the dense model. That
mean is a constant, so it is added to a bias that ends in the residual stream: of the last block that remains
before the removed one or, for a removed attention, of its own output projection. Which linear of a block has
such a bias is found by changing it.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.model.blocks import blocks, forward, linears
from stages.pruning.depth.observe import Target, observe, stream_out
from stages.pruning.depth.remove import output_projections

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def check_biases(model: PreTrainedModel, target: Target) -> None:
    """Refuse a family without a bias that can hold a mean.

    Raises:
        Refusal: it has none.
    """
    if target == "block":
        stream_bias(model, 0)
        return
    projections = output_projections(model)
    if lacking := [linear.name for linear in projections if linear.module.bias is None]:
        raise Refusal(
            f"replace_by_mean: {type(model).__name__} has no bias in {lacking[0]} to hold the mean of an "
            "attention; leave replace_by_mean out."
        )


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
        "could hold a mean update; leave replace_by_mean out."
    )


def _output(model: PreTrainedModel, block: nn.Module) -> Tensor:
    """Return the output of a block for two tokens, `[1, 2, hidden]`."""
    outputs: list[Tensor] = []
    with block.register_forward_hook(lambda _, __, output: outputs.append(stream_out(output))):
        forward(model, torch.zeros(1, 2, dtype=torch.long))
    return outputs[0].clone()
