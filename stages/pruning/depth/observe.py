"""Watching a decoder's residual stream.

A block reads the stream x and adds to it: x -> x + f(x). `observe` shows every block's x and x + f(x), or
those of its attention, through hooks on the model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tqdm import tqdm

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.model.blocks import blocks, check_length, forward
from stages.pruning.depth.remove import attention_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Target = Literal["block", "attention"]
"""What is removed: whole blocks, or their attention."""
See: TypeAlias = "Callable[[int, Tensor, Tensor], None]"
"""(block number, the stream before it, the stream after it), both `[windows, tokens, hidden]`."""


def stream_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a block."""
    stream: Tensor = args[0] if args else kwargs["hidden_states"]
    return stream


def observe(
    model: PreTrainedModel, windows: Tensor, batch_size: int, target: Target, see: See, label: str
) -> None:
    """Call `see` for every block and every `batch_size` windows of one forward.

    Raises:
        Refusal: NaN or infinite hidden states, or windows longer than the model reads.
    """
    check_length(model, windows)
    names = [name for name, _ in blocks(model)]

    def checked(number: int, before: Tensor, after: Tensor) -> None:
        if not after.isfinite().all():
            raise Refusal(f"{names[number]}: NaN or infinite hidden states after it; nothing was written.")
        see(number, before, after)

    with ExitStack() as hooks:
        for number, (name, block) in enumerate(blocks(model)):
            attention = attention_of(name, block) if target == "attention" else None
            _watch(number, block, attention, checked, hooks)
        for batch in tqdm(windows.split(batch_size), desc=label, unit="batch"):
            forward(model, batch)


def _watch(number: int, block: nn.Module, attention: nn.Module | None, see: See, hooks: ExitStack) -> None:
    """Hooks on one block. What an attention adds is its output, or that of a norm it is handed to."""
    held: dict[str, Tensor] = {}

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        held["stream"] = stream_of(args, kwargs)

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        see(number, held["stream"], held["stream"] + held["added"] if attention else first_of(output))
        held.clear()

    def attend(_: nn.Module, __: Any, output: Any) -> None:
        held["added"] = first_of(output)

    def follow(_: nn.Module, args: Any, output: Any) -> None:
        if args and args[0] is held.get("added"):
            held["added"] = output

    hooks.enter_context(block.register_forward_pre_hook(enter, with_kwargs=True))
    hooks.enter_context(block.register_forward_hook(leave))
    for child in block.children() if attention else ():
        hooks.enter_context(child.register_forward_hook(attend if child is attention else follow))


def first_of(output: Any) -> Tensor:
    """The hidden states among what a block or an attention returns."""
    stream: Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return stream
