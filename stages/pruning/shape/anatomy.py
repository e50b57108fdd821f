"""Which linears of a block are its MLP and which its attention, told by what they do.

No name is asked. In a dry run over a few tokens every linear is stood in for by drawn numbers, so that
nothing flows through a linear and what one puts out reaches only the next one on each path. Then one
linear's numbers change, in every other feature and at one token, and the inputs that change say what lies
between:

- the very features at the very token: an elementwise activation, a product with a gate. The two linears are
  the first and the last of an MLP, and a feature between them is a neuron;
- later tokens as well: attention lies between, and its heads are slices of the second linear's input;
- every feature of that token: a norm, so they have nothing to do with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.numbers import finite
from stages.model.blocks import Linear, blocks, forward, linears

if TYPE_CHECKING:
    from torch import Tensor, nn

TOKENS, TOUCHED = 4, 1
"""Tokens of the dry run, and the one at which a linear's output is changed."""


@dataclass(frozen=True)
class Part:
    """A part of a block: `readers` put out what its inside is made of, `writer` takes the inside in.

    In an MLP they are gate and up (or the one first linear) and down; in attention q, k and v, and o.
    """

    readers: list[Linear]
    writer: Linear

    @property
    def width(self) -> int:
        """Features of the inside."""
        return self.writer.weight.shape[1]


def mlps(model: nn.Module) -> dict[str, Part]:
    """The MLP of every block, by the block's full name.

    Raises:
        Refusal: a block without an MLP or with several, or MLPs of several widths.
    """
    return _one_each(model, "MLPs with one feature a neuron", lambda found: found[0])


def attentions(model: nn.Module) -> dict[str, Part]:
    """The attention of every block, by the block's full name.

    Raises:
        Refusal: a block without attention or with several, or attentions of several widths.
    """
    return _one_each(model, "attentions", lambda found: found[1])


def reach(model: nn.Module, parts: Mapping[str, Part], size: int) -> dict[str, int]:
    """How far the first `size` features of each reader reach, by its full name.

    Told is after how many features of the writer's input, counted from the first, nothing changes any more.

    Args:
        parts: by the full name of the block they are of.
    """
    found, calls = linears(model), _calls(model)
    told: dict[str, int] = {}
    for name, block in blocks(model):
        inside = [one for one in found if one.block == name]
        drawn = _drawn(inside)
        writer = parts[name].writer.name
        still = _inputs(block, inside, calls[name], drawn)[writer]
        for one in parts[name].readers:
            moved = drawn[one.name].clone()
            moved[TOUCHED, :size] = moved[0, :size]
            inputs = _inputs(block, inside, calls[name], drawn | {one.name: moved})[writer]
            changed = (inputs != still).any(0).nonzero()
            told[one.name] = int(changed.max()) + 1 if len(changed) else 0
    return told


def _one_each(
    model: nn.Module, what: str, pick: Callable[[tuple[list[Part], list[Part]]], list[Part]]
) -> dict[str, Part]:
    found, calls = linears(model), _calls(model)
    parts: dict[str, Part] = {}
    for name, block in blocks(model):
        fitting = pick(_parts(block, [one for one in found if one.block == name], calls[name]))
        if len(fitting) != 1:
            raise Refusal(f"{type(model).__name__}: {name} has {len(fitting)} {what}; exactly one is served.")
        parts[name] = fitting[0]
    if len(widths := {part.width for part in parts.values()}) > 1:
        raise Refusal(
            f"{type(model).__name__}: the widths of its {what.split()[0]} differ "
            f"({', '.join(map(str, sorted(widths)))}); only blocks all alike are served."
        )
    return parts


def _calls(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """What the model hands to each of its blocks for a few tokens."""
    calls: dict[str, tuple[Any, Any]] = {}

    def noting(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(_: nn.Module, args: Any, kwargs: Any) -> None:
            calls[name] = args, kwargs

        return note

    handles = [
        block.register_forward_pre_hook(noting(name), with_kwargs=True) for name, block in blocks(model)
    ]
    try:
        forward(model, torch.arange(TOKENS)[None])
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _parts(block: nn.Module, found: list[Linear], call: tuple[Any, Any]) -> tuple[list[Part], list[Part]]:
    """The MLPs and the attentions of a block."""
    drawn = _drawn(found)
    still = _inputs(block, found, call, drawn)
    if broken := [name for name, inputs in still.items() if not finite(inputs)]:
        raise Refusal(f"NaN or infinite inputs of {', '.join(broken[:8])}; nothing was written.")
    readers: dict[str, list[Linear]] = {one.name: [] for one in found}
    mixed: set[str] = set()
    blurred: set[str] = set()
    for one in found:
        moved = drawn[one.name].clone()
        moved[TOUCHED, ::2] += 1
        inputs = _inputs(block, found, call, drawn | {one.name: moved})
        for name in inputs:
            changed = inputs[name] != still[name]
            if not changed.any():
                continue
            readers[name].append(one)
            if changed[:TOUCHED].any() or changed[TOUCHED + 1 :].any():
                mixed.add(name)
            if changed.shape[1] != one.weight.shape[0] or changed[:, 1::2].any():
                blurred.add(name)
    parts = [Part(readers[one.name], one) for one in found if readers[one.name]]
    return (
        [part for part in parts if part.writer.name not in mixed | blurred],
        [part for part in parts if part.writer.name in mixed],
    )


def _drawn(found: list[Linear]) -> dict[str, Tensor]:
    """What stands in for the outputs of linears, `[tokens, out]` by full name."""
    draw = torch.Generator().manual_seed(0)
    return {
        one.name: torch.randn(TOKENS, one.weight.shape[0], generator=draw).to(one.weight) for one in found
    }


def _inputs(
    block: nn.Module, found: list[Linear], call: tuple[Any, Any], outputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What each linear is handed, `[tokens, in]`, while it puts out `outputs` `[tokens, out]`."""
    seen: dict[str, Tensor] = {}

    def stand_in(one: Linear) -> Callable[[Tensor], Tensor]:
        def stands(inputs: Tensor) -> Tensor:
            seen[one.name] = inputs.reshape(TOKENS, -1).clone()
            return outputs[one.name].view(*inputs.shape[:-1], -1)

        return stands

    for one in found:
        one.module.forward = stand_in(one)
    try:
        with torch.no_grad():
            block(*call[0], **call[1])
    finally:
        for one in found:
            del one.module.forward
    return seen
