"""A block's call on all calibration windows, run a few windows at a time.

The arguments of a call differ by family and by layer, so each is cut according to its type:

- a tensor that has rows for every window is cut; any other is shared, such as positions that are equal for
  all windows;
- lists, tuples and mappings are cut entry by entry. Blocks may write to them: some blocks of Gemma 4 leave
  their keys and values in a mapping, where later blocks read them. So every run of a batch gets copies, and
  the entries that its last run wrote are joined over all batches and put into the model's own container,
  which reaches the later blocks;
- numbers, strings and None are shared. Anything else, such as a cache, is refused by name.
"""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal
from stages.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_MAPPINGS = (dict, UserDict)
_CONTAINERS = (list, tuple, *_MAPPINGS)


class BatchedCall:
    """The call of a block on `count` windows, cut into calls on `size` windows each.

    Args:
        call: (args, kwargs).
        single: the same call on one window. A tensor with `count` times its rows is cut (BLOOM's positions
            have one row per window and head). Shapes alone cannot tell windows from as many heads.
    """

    def __init__(self, call: Any, count: int, size: int, single: Any) -> None:
        self._call = call
        self._parts = [call]
        if size < count:
            self._parts = [_cut(call, single, count, start, size) for start in range(0, count, size)]
        self._handed: list[Any] = [None] * len(self._parts)
        self._outputs: list[Any] = [None] * len(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def run(self, forward: Callable[..., Any], number: int) -> Any:
        """Run one batch, again from its own inputs if it ran before, and return the block's output."""
        args, kwargs = self._handed[number] = _copied(self._parts[number])
        self._outputs[number] = output = forward(*args, **kwargs)
        return output

    def effects(self, forward: Callable[..., Any], number: int) -> list[Tensor]:
        """Run one batch, and return the tensors that later blocks may read.

        These are its hidden states, and all tensors of the containers that the block was handed.
        """
        output = self.run(forward, number)
        args, kwargs = self._handed[number]
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        return [hidden, *(tensor for value in (*args, *kwargs.values()) for tensor in _tensors(value))]

    def join(self) -> Any:
        """Return the block's output for all windows, and hand on the entries that the blocks wrote."""
        _merged(self._call, self._parts, self._handed)
        return _joined(self._outputs)


def check_call(name: str, call: Any) -> None:
    """Refuse a call whose arguments cannot be divided into batches.

    Args:
        name: of the block.
        call: (args, kwargs).

    Raises:
        Refusal: some argument is neither a tensor nor a plain value or container.
    """
    args, kwargs = call
    named = {**{f"argument {number}": value for number, value in enumerate(args)}, **kwargs}
    if strange := [f"{key} ({type(value).__name__})" for key, value in named.items() if not _plain(value)]:
        raise Refusal(
            f"{name} is handed {', '.join(strange)}, which cannot be divided into batches of windows; use a "
            "method that reads no text, such as magnitude or rtn."
        )


def check_rows(name: str, call: Any, single: Any) -> None:
    """Refuse a call with tensors whose windows are not their rows.

    Args:
        name: of the block.
        call: (args, kwargs).
        single: the same block's call on one window.

    Raises:
        Refusal: some tensor has its windows in another dimension than the first (Gemma 3n's stream).
    """
    for value, one in zip(_tensors(list(call)), _tensors(list(single)), strict=True):
        if value.shape[1:] != one.shape[1:]:
            raise Refusal(
                f"{name} is handed a tensor {list(value.shape)} that is {list(one.shape)} for one window, so "
                "its windows are not its rows and it cannot be divided into batches; use a method that reads "
                "no text, such as magnitude or rtn."
            )


def _plain(value: Any) -> bool:
    if isinstance(value, _CONTAINERS):
        return all(map(_plain, _entries(value).values()))
    values = torch.Tensor | torch.dtype | torch.device | Enum | bool | int | float | complex | str | bytes
    return value is None or isinstance(value, values)


def _entries(container: Any) -> dict[Any, Any]:
    """Return the entries of a container by key, or by place."""
    return dict(container) if isinstance(container, _MAPPINGS) else dict(enumerate(container))


def _rebuilt(container: Any, values: list[Any]) -> Any:
    """Return a container of the same type and keys with other values."""
    if isinstance(container, _MAPPINGS):
        new = copy.copy(container)
        new.update(zip(container, values, strict=True))
        return new
    return getattr(container, "_make", type(container))(values)  # a named tuple has `_make`


def _cut(value: Any, counterpart: Any, count: int, start: int, size: int) -> Any:
    """Return the part of `value` for `size` of `count` windows; see `BatchedCall` for its `counterpart`."""
    if isinstance(value, torch.Tensor) and value.ndim:
        rows = len(counterpart) if isinstance(counterpart, torch.Tensor) and counterpart.ndim else 1
        return value[start * rows : (start + size) * rows] if len(value) == count * rows else value
    if isinstance(value, _CONTAINERS):
        others = _entries(counterpart) if isinstance(counterpart, _CONTAINERS) else {}
        parts = [_cut(v, others.get(k), count, start, size) for k, v in _entries(value).items()]
        return _rebuilt(value, parts)
    return value


def _tensors(value: Any, *, within: bool = False) -> list[Tensor]:
    """Return the tensors in the lists and mappings of `value`.

    Args:
        within: whether `value` is in such a container itself.
    """
    if isinstance(value, torch.Tensor):
        return [value] if within else []
    if not isinstance(value, _CONTAINERS):
        return []
    within = within or not isinstance(value, tuple)
    return [tensor for entry in _entries(value).values() for tensor in _tensors(entry, within=within)]


def _copied(value: Any) -> Any:
    """Copy the containers of `value`; their tensors stay the same."""
    if isinstance(value, _CONTAINERS):
        return _rebuilt(value, [_copied(entry) for entry in _entries(value).values()])
    return value


def _merged(whole: Any, parts: list[Any], handed: list[Any]) -> Any:
    """Return `whole` with the entries that runs wrote to their batches' copies, changed in place.

    Args:
        parts: `whole`, cut into batches.
        handed: copies of these, after the runs.
    """
    if all(ours is part for ours, part in zip(handed, parts, strict=True)):
        return whole
    containers = tuple if isinstance(whole, tuple) else list if isinstance(whole, list) else _MAPPINGS
    if not all(isinstance(each, containers) for each in (whole, *handed)):
        return _joined(handed)
    old, given, now = _entries(whole), list(map(_entries, parts)), list(map(_entries, handed))
    if any(each.keys() != now[0].keys() for each in now):
        raise Refusal("a block writes different entries for some windows; use a data-free method.")
    new = {
        key: _merged(old.get(key), [each.get(key) for each in given], [each[key] for each in now])
        for key in now[0]
    }
    if isinstance(whole, tuple):
        return _rebuilt(whole, list(new.values()))
    if isinstance(whole, list):
        whole[:] = new.values()
    else:
        whole.clear()
        whole.update(new)
    return whole


def _joined(values: list[Any]) -> Any:
    """Join what a block returned or wrote for consecutive batches into its value for all windows.

    Raises:
        Refusal: a value is no tensor of windows and differs between batches.
    """
    first = values[0]
    if len(values) == 1:
        return first
    if isinstance(first, torch.Tensor) and first.ndim:
        return torch.cat(values)
    if isinstance(first, _CONTAINERS):
        entries = list(map(_entries, values))
        return _rebuilt(first, [_joined([each[key] for each in entries]) for key in entries[0]])
    if any(value is not first and value != first for value in values):
        raise Refusal(
            f"a block returns a {type(first).__name__} that differs between batches; use a data-free method, "
            "or as many windows at a time as there are (batch_size)."
        )
    return first
