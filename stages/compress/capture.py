"""What flows into a block and its linears, captured from the model's own forward.

The arguments of a block's call differ by family and layer, so they are recorded rather than built. Linears
that are handed the same tensor (q, k and v; gate and up) form a `Group` and share one statistic of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

from stages.compress.statistics import Statistic
from stages.core.errors import Refusal
from stages.core.lazy import mock, torch
from stages.model.blocks import Linear

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class Group:
    """Linears of a block that are handed the same tensor."""

    linears: list[Linear]
    feeder: nn.Module | None
    """The module whose output the tensor is, a norm for example; None where it is computed inline."""
    inputs: Tensor
    """The tensor in the run that found the group, `[windows, tokens, in]` or `[tokens, in]`."""
    statistic: Statistic | None = None


class _Reached(Exception):
    """Ends a forward at the block whose arguments are captured."""


def call_of(block: nn.Module, forward: Callable[[], object]) -> Any:
    """Return (args, kwargs) of the block's first call in `forward`, which computes nothing beyond it."""
    calls: list[Any] = []

    def stop(*args: Any, **kwargs: Any) -> None:
        calls.append((args, kwargs))
        raise _Reached

    with mock.patch.object(block, "forward", stop), suppress(_Reached):
        forward()
    if not calls:
        raise AssertionError("the model's forward never calls its first block")
    return calls[0]


def input_groups(block: nn.Module, linears: list[Linear], forward: Callable[[], object]) -> list[Group]:
    """Group a block's linears by the tensor they are handed, in the order in which they compute.

    Args:
        forward: passes some windows through the block.

    Raises:
        Refusal: a linear is never reached, or reached more than once.
    """
    groups: dict[int, Group] = {}
    makers: dict[int, tuple[ReferenceType[Tensor], nn.Module]] = {}
    by_module = {linear.module: linear for linear in linears}

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # The group keeps the tensor alive, so its id stays its own.
        group = groups.setdefault(id(args[0]), Group([], maker(args[0]), args[0]))
        group.linears.append(by_module[module])

    def maker(tensor: Tensor) -> nn.Module | None:
        output, module = makers.get(id(tensor), (None, None))
        return module if output and output() is tensor else None  # ids of freed tensors are reused

    def after(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and maker(output) is None:
            makers[id(output)] = ref(output), module

    handles = [linear.module.register_forward_pre_hook(before) for linear in linears]
    handles += [
        module.register_forward_hook(after) for module in block.modules() if not list(module.children())
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    times = Counter(linear.name for group in groups.values() for linear in group.linears)
    if missed := [linear.name for linear in linears if not times[linear.name]]:
        raise Refusal(f"the model's forward never reaches {', '.join(missed)}; list them in ignore.")
    if repeated := [name for name, count in times.items() if count > 1]:
        raise Refusal(
            f"the model's forward passes more than once through {', '.join(repeated)}; list them in ignore."
        )
    return list(groups.values())
