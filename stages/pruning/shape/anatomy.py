"""The MLP and the attention of a block, found by what its linears do.

Names are not used. In a dry run over a few tokens every linear returns random numbers, so nothing flows
through a linear and its output reaches only the next linear on each path. Then the output of one linear
changes, in every other feature and at one token, and the inputs that change with it show what lies between:

- the same features at the same token: an elementwise activation or a product with a gate. The two linears are
  the first and the last of an MLP, and a feature between them is a neuron;
- later tokens as well: attention lies between, and its heads are slices of the second linear's input;
- every feature of that token: a norm, so the two linears are not of one part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal
from stages.core.lazy import mock, torch
from stages.core.numbers import finite
from stages.model.blocks import Linear, blocks, forward, linears

if TYPE_CHECKING:
    from torch import Tensor, nn

_TOKENS = 4
"""Tokens of the dry run."""
_CHANGED = 1
"""The token at which the output of a linear is changed."""
_CURE = "Neurons and heads cannot be removed beside them; use a method that has ignore, or method depth."


def whole_linears(model: nn.Module) -> list[Linear]:
    """Return every linear of every block; a block's other matrices would keep their size, so refuse them.

    Raises:
        Refusal: a matrix is no linear's weight.
    """
    return linears(model, cure=_CURE)


@dataclass(frozen=True)
class Part:
    """A part of a block: `readers` compute its inside, and `writer` has the inside as its input.

    In an MLP they are gate and up (or the only first linear) and down; in attention q, k and v, and o.
    """

    readers: list[Linear]
    writer: Linear

    @property
    def width(self) -> int:
        """The number of features of the inside."""
        return self.writer.weight.shape[1]


def mlps(model: nn.Module) -> dict[str, Part]:
    """Return the MLP of every block, by the block's full name.

    Raises:
        Refusal: a block has no MLP or several, or MLPs differ in width.
    """
    return _only_parts(model, "MLPs with one feature per neuron", lambda mlps, _: mlps)


def attentions(model: nn.Module) -> dict[str, Part]:
    """Return the attention of every block, by the block's full name.

    Raises:
        Refusal: a block has no attention or several, or attentions differ in width.
    """
    return _only_parts(model, "attentions", lambda _, attentions: attentions)


def reach(model: nn.Module, parts: Mapping[str, Part], size: int) -> dict[str, int]:
    """Return how far the first `size` features of each reader reach, by the reader's full name.

    The reach is the number of features of the writer's input, counted from the first, after which none
    changes.

    Args:
        parts: by the full name of their block.
    """
    calls = _block_calls(model)
    reaches: dict[str, int] = {}
    for name, block in blocks(model):
        inside = [linear for linear in whole_linears(model) if linear.block == name]
        outputs = _random_outputs(inside)
        writer = parts[name].writer.name
        before = _inputs(block, inside, calls[name], outputs)[writer]
        for reader in parts[name].readers:
            changed = outputs[reader.name].clone()
            changed[_CHANGED, :size] = changed[0, :size]
            after = _inputs(block, inside, calls[name], outputs | {reader.name: changed})[writer]
            features = (after != before).any(0).nonzero()
            reaches[reader.name] = int(features.max()) + 1 if len(features) else 0
    return reaches


def _only_parts(
    model: nn.Module, kind: str, choose: Callable[[list[Part], list[Part]], list[Part]]
) -> dict[str, Part]:
    """Return the only part of a kind in every block.

    Args:
        kind: in the plural, for messages.
        choose: (MLPs, attentions) of a block -> those of this kind.
    """
    calls = _block_calls(model)
    parts: dict[str, Part] = {}
    for name, block in blocks(model):
        inside = [linear for linear in whole_linears(model) if linear.block == name]
        candidates = choose(*_parts(block, inside, calls[name]))
        if len(candidates) != 1:
            raise Refusal(
                f"{type(model).__name__}: {name} has {len(candidates)} {kind}; a block must have exactly "
                "one. Use another method."
            )
        parts[name] = candidates[0]
    if len(widths := {part.width for part in parts.values()}) > 1:
        raise Refusal(
            f"{type(model).__name__}: the widths of its {kind.split()[0]} differ "
            f"({', '.join(map(str, sorted(widths)))}); all blocks must have the same."
        )
    return parts


def _block_calls(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Return (args, kwargs) of the call of each block for a few tokens, by the block's full name."""
    with ExitStack() as patches:
        forwards = {
            name: patches.enter_context(mock.patch.object(block, "forward", wraps=block.forward))
            for name, block in blocks(model)
        }
        forward(model, torch.arange(_TOKENS)[None])
    return {name: (call.call_args.args, call.call_args.kwargs) for name, call in forwards.items()}


def _parts(
    block: nn.Module, inside: Sequence[Linear], call: tuple[Any, Any]
) -> tuple[list[Part], list[Part]]:
    """Return the MLPs and the attentions of a block.

    Args:
        inside: the linears of the block.
    """
    outputs = _random_outputs(inside)
    before = _inputs(block, inside, call, outputs)
    if broken := [name for name, inputs in before.items() if not finite(inputs)]:
        raise Refusal(
            f"NaN or infinite inputs of {', '.join(broken[:8])}; nothing was written. Set run.dtype to "
            "bfloat16 or float32, or check the source."
        )
    readers: dict[str, list[Linear]] = {linear.name: [] for linear in inside}
    mixes_tokens: set[str] = set()
    mixes_features: set[str] = set()
    for reader in inside:
        moved = outputs[reader.name].clone()
        moved[_CHANGED, ::2] += 1
        after = _inputs(block, inside, call, outputs | {reader.name: moved})
        for name in after:
            changed = after[name] != before[name]
            if not changed.any():
                continue
            readers[name].append(reader)
            if changed[:_CHANGED].any() or changed[_CHANGED + 1 :].any():
                mixes_tokens.add(name)
            if changed.shape[1] != reader.weight.shape[0] or changed[:, 1::2].any():
                mixes_features.add(name)
    parts = [Part(readers[linear.name], linear) for linear in inside if readers[linear.name]]
    return (
        [part for part in parts if part.writer.name not in mixes_tokens | mixes_features],
        [part for part in parts if part.writer.name in mixes_tokens],
    )


def _random_outputs(inside: Sequence[Linear]) -> dict[str, Tensor]:
    """Return random numbers for the outputs of linears, `[tokens, out]` by full name."""
    draw = torch.Generator().manual_seed(0)
    return {
        linear.name: torch.randn(_TOKENS, linear.weight.shape[0], generator=draw).to(linear.weight)
        for linear in inside
    }


def _inputs(
    block: nn.Module, inside: Sequence[Linear], call: tuple[Any, Any], outputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the inputs of each linear, `[tokens, in]` by name, if it returns its entry of `outputs`."""
    inputs: dict[str, Tensor] = {}

    def fixed(linear: Linear) -> Callable[[Tensor], Tensor]:
        def fixed_forward(values: Tensor) -> Tensor:
            inputs[linear.name] = values.reshape(_TOKENS, -1).clone()
            return outputs[linear.name].view(*values.shape[:-1], -1)

        return fixed_forward

    with torch.no_grad(), ExitStack() as patches:
        for linear in inside:
            patches.enter_context(mock.patch.object(linear.module, "forward", fixed(linear)))
        block(*call[0], **call[1])
    return inputs
