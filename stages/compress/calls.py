"""The arguments of one call of a block cut up by windows, and what the pieces return put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stages.core.lazy import torch

if TYPE_CHECKING:
    from torch import nn


class _Reached(Exception):
    """The block whose arguments were asked for."""


def arguments(block: nn.Module, run: Callable[[], object]) -> Any:
    """What `run` calls the block with, (args, kwargs); nothing from there on is computed."""
    held: list[Any] = []

    def stop(*args: Any, **kwargs: Any) -> None:
        held.append((args, kwargs))
        raise _Reached

    block.forward = stop
    try:
        run()
    except _Reached:
        return held[0]
    finally:
        del block.forward
    raise AssertionError("the forward never reaches its first block")


def split(call: Any, count: int, size: int, single: Any) -> list[Any]:
    """`call` once for every `size` of its `count` windows: tensors with rows of every window cut.

    Args:
        single: a call with one window, as no shape alone tells windows from as many attention heads. What
            has `count` times its rows is cut (BLOOM's positions have a row a window and head), what has
            the same is shared (masks and positions that are alike for all windows).
    """
    if size >= count:
        return [call]

    def cut(value: Any, like: Any, start: int) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim:
            rows = len(like) if isinstance(like, torch.Tensor) and like.ndim else 1
            return value[start * rows : (start + size) * rows] if len(value) == count * rows else value
        if isinstance(value, tuple | list):
            alike = (
                like if isinstance(like, tuple | list) and len(like) == len(value) else [None] * len(value)
            )
            return type(value)(cut(*pair, start) for pair in zip(value, alike, strict=True))
        if isinstance(value, dict):
            known = like if isinstance(like, dict) else {}
            return {key: cut(one, known.get(key), start) for key, one in value.items()}
        return value

    return [cut(call, single, start) for start in range(0, count, size)]


def joined(outputs: list[Any]) -> Any:
    """The outputs of consecutive windows as one."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat(outputs)
    if isinstance(first, tuple | list):
        return type(first)(joined(list(parts)) for parts in zip(*outputs, strict=True))
    return first
