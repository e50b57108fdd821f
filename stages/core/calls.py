"""The arguments of one call of a block cut up by windows, and what the pieces return put together."""

from typing import Any

import torch
from torch import Tensor


def split(call: Any, count: int, size: int) -> list[Any]:
    """`call` once for every `size` of its `count` windows: tensors of that many rows cut, the rest shared.

    Shared are masks and positions with one row for all windows, and vectors.
    """
    if size >= count:
        return [call]

    def cut(value: Any, start: int) -> Any:
        if isinstance(value, Tensor):
            return value[start : start + size] if value.ndim > 1 and value.shape[0] == count else value
        if isinstance(value, tuple | list):
            return type(value)(cut(one, start) for one in value)
        if isinstance(value, dict):
            return {key: cut(one, start) for key, one in value.items()}
        return value

    return [cut(call, start) for start in range(0, count, size)]


def joined(outputs: list[Any]) -> Any:
    """The outputs of consecutive windows as one."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if isinstance(first, tuple | list):
        return type(first)(joined(list(parts)) for parts in zip(*outputs, strict=True))
    return first
