"""What a removed block can leave behind: its mean update on the calibration text (2407.16286).

x -> x + f(x) becomes x -> x + E f(x), with the mean over all tokens of the dense model. A constant needs
no block, only a bias that adds to the residual stream: that of the last kept block before it, or for an
attention that of its own output projection. Which linear has such a bias is found by moving it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.model.blocks import Linear, blocks, forward, linears
from stages.pruning.depth.observe import Target, first_of, observe
from stages.pruning.depth.remove import output_projections

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def check(model: PreTrainedModel, target: Target) -> None:
    """Refuse a family without a bias that could hold a mean.

    Raises:
        Refusal: it has none.
    """
    if target == "block":
        holder(model, 0)
        return
    if lacking := [one.name for one in output_projections(model) if one.module.bias is None]:
        raise Refusal(
            f"replace_by_mean: {type(model).__name__} has no bias in {lacking[0]}, so nothing can hold the "
            "mean of an attention; leave replace_by_mean out."
        )


def updates(model: PreTrainedModel, windows: Tensor, batch_size: int, target: Target) -> dict[int, Tensor]:
    """E f(x) over all tokens, `[hidden]` fp64 on the CPU, by block number.

    Of an attention it is the mean of what its output projection gives.
    """
    sums: dict[int, Tensor] = {}

    def add(number: int, values: Tensor) -> None:
        total = values.double().flatten(0, -2).sum(0).cpu()
        sums[number] = sums[number] + total if number in sums else total

    handles = []
    if target == "attention":
        for number, one in enumerate(output_projections(model)):
            handles.append(
                one.module.register_forward_hook(lambda _, __, output, number=number: add(number, output))
            )

    def see(number: int, before: Tensor, after: Tensor) -> None:
        if target == "block":
            add(number, after.double() - before.double())

    try:
        observe(model, windows, batch_size, "block", see, "mean update")
    finally:
        for handle in handles:
            handle.remove()
    return {number: total / windows.numel() for number, total in sums.items()}


def leave(model: PreTrainedModel, removed: tuple[int, ...], means: dict[int, Tensor]) -> None:
    """Add the mean of each block to be removed to a bias of the last block before it that stays.

    Args:
        removed: without block 0.
    """
    for number in removed:
        before = max(set(range(number)) - set(removed))
        held = holder(model, before).module.get_parameter("bias").data
        held.copy_(held.double() + means[number].to(held.device))


def holder(model: PreTrainedModel, number: int) -> Linear:
    """The last linear of a block whose bias, when moved, moves the block's output by as much.

    Raises:
        Refusal: there is none.
    """
    name, block = blocks(model)[number]
    before = _output(model, block)
    step = torch.ones_like(before[0, 0]) * before.abs().max().clamp(min=1)
    for one in reversed([one for one in linears(model, partial=True) if one.block == name]):
        bias: Any = one.module.bias
        if bias is None or bias.shape != step.shape:
            continue
        was = bias.data.clone()
        bias.data.add_(step)
        moved = _output(model, block) - before
        bias.data.copy_(was)
        if torch.allclose(moved, step.expand_as(moved), rtol=0.05):
            return one
    raise Refusal(
        f"replace_by_mean: {type(model).__name__} has no bias in {name} that adds to the residual stream, so "
        "nothing can hold a mean update; leave replace_by_mean out."
    )


def _output(model: PreTrainedModel, block: nn.Module) -> Tensor:
    """What a block gives for two tokens, `[1, 2, hidden]`."""
    seen: list[Tensor] = []
    handle = block.register_forward_hook(lambda _, __, output: seen.append(first_of(output)))
    try:
        forward(model, torch.zeros(1, 2, dtype=torch.long))
    finally:
        handle.remove()
    return seen[0].clone()
