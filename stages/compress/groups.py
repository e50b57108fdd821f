"""Which linears of a block are handed the same tensor, and so share one statistic of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import ReferenceType, ref

from stages.compress.statistics import Statistic
from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.model.blocks import Linear

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class Group:
    """Linears of a block that are handed the same tensor.

    `feeder` is the module whose output that tensor is (a norm, say), None where it is computed inline.
    `inputs` is what they were handed when they were found, `[windows, tokens, in]` or `[tokens, in]`.
    """

    linears: list[Linear]
    feeder: nn.Module | None
    inputs: Tensor
    statistic: Statistic | None = None


def input_groups(block: nn.Module, found: list[Linear], run: Callable[[], object]) -> list[Group]:
    """The linears of a block by the tensor they are handed, in the order in which they compute.

    Args:
        run: puts something through the block.

    Raises:
        Refusal: a linear that is never reached, or more than once.
    """
    groups: dict[int, Group] = {}
    makers: dict[int, tuple[ReferenceType[Tensor], nn.Module]] = {}
    by_module = {linear.module: linear for linear in found}

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        group = groups.setdefault(id(args[0]), Group([], maker(args[0]), args[0]))  # which keeps the tensor
        group.linears.append(by_module[module])

    def maker(tensor: Tensor) -> nn.Module | None:
        made, module = makers.get(id(tensor), (None, None))
        return module if made and made() is tensor else None  # an id is used again once its tensor is gone

    def after(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and maker(output) is None:
            makers[id(output)] = ref(output), module

    handles = [linear.module.register_forward_pre_hook(before) for linear in found]
    handles += [
        module.register_forward_hook(after) for module in block.modules() if not list(module.children())
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    reached = Counter(linear.name for group in groups.values() for linear in group.linears)
    if missed := [linear.name for linear in found if not reached[linear.name]]:
        raise Refusal(f"the model's forward never reaches {', '.join(missed)}; list them in ignore.")
    if again := [name for name, times in reached.items() if times > 1]:
        raise Refusal(
            f"the model's forward passes more than once through {', '.join(again)}; list them in ignore."
        )
    return list(groups.values())
