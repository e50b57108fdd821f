"""Observation of a decoder's residual stream.

A block reads the stream x and adds to it: x -> x + f(x). `observe` passes x and x + f(x) of every block, or
of its attention, to an observer, through hooks on the model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeAlias

from tqdm import tqdm

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.model.blocks import blocks, check_length, forward
from stages.pruning.depth.remove import Target, attention_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Observer: TypeAlias = "Callable[[int, Tensor, Tensor], None]"
"""(block number, the stream before it, the stream after it), both `[windows, tokens, hidden]`."""


def stream_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the stream among the arguments of a block."""
    stream: Tensor = args[0] if args else kwargs["hidden_states"]
    return stream


def stream_out(output: Any) -> Tensor:
    """Return the stream among the values a block or an attention returns."""
    stream: Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return stream


def observe(
    model: PreTrainedModel, windows: Tensor, batch_size: int, target: Target, observer: Observer, label: str
) -> None:
    """Call `observer` for every block and every `batch_size` windows of one forward.

    Raises:
        Refusal: NaN or infinite hidden states, or windows longer than the model reads.
    """
    check_length(model, windows)
    names = [name for name, _ in blocks(model)]

    def checked(number: int, before: Tensor, after: Tensor) -> None:
        if not after.isfinite().all():
            raise Refusal(
                f"NaN or infinite hidden states after {names[number]}; nothing was written. Set run.dtype to "
                "bfloat16 or float32, or check the source."
            )
        observer(number, before, after)

    with ExitStack() as hooks:
        for number, (name, block) in enumerate(blocks(model)):
            attention = attention_of(name, block) if target == "attention" else None
            _hook(number, block, attention, checked, hooks)
        for batch in tqdm(windows.split(batch_size), desc=label, unit="batch"):
            forward(model, batch)


def _hook(
    number: int, block: nn.Module, attention: nn.Module | None, observer: Observer, hooks: ExitStack
) -> None:
    """Hook one block.

    What an attention adds to the stream is its output, or that of the norm that follows it.
    """
    tensors: dict[str, Tensor] = {}

    def before_block(_: nn.Module, args: Any, kwargs: Any) -> None:
        tensors["stream"] = stream_in(args, kwargs)

    def after_block(_: nn.Module, __: Any, output: Any) -> None:
        before = tensors["stream"]
        observer(number, before, before + tensors["added"] if attention else stream_out(output))
        tensors.clear()

    def after_attention(_: nn.Module, __: Any, output: Any) -> None:
        tensors["added"] = stream_out(output)

    def after_sibling(_: nn.Module, args: Any, output: Any) -> None:
        if args and args[0] is tensors.get("added"):
            tensors["added"] = output

    hooks.enter_context(block.register_forward_pre_hook(before_block, with_kwargs=True))
    hooks.enter_context(block.register_forward_hook(after_block))
    for child in block.children() if attention else ():
        after = after_attention if child is attention else after_sibling
        hooks.enter_context(child.register_forward_hook(after))
