"""A decoder's blocks and the linears in them, whatever its family.

No class name of a model is known here: the blocks are the longest list of modules the config speaks of,
and a linear is a linear (or GPT-2's Conv1D, which stores its weight transposed). A matrix of a block that
is not the weight of a linear (the 3-D experts of a mixture, say) would be invisible to every method. It is
refused by name unless the recipe lists it in `ignore`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal
from stages.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Linear:
    """A linear of a decoder block: its block, full name and module, and whether it is stored `[in, out]`."""

    block: str
    name: str
    module: nn.Module
    transposed: bool

    @property
    def weight(self) -> Tensor:
        """The weight as `[out, in]`, sharing storage with the module."""
        weight: Tensor = self.module.weight.data  # type: ignore[assignment]
        return weight.T if self.transposed else weight

    def put(self, weight: Tensor) -> None:
        """Give the module this weight, `[out, in]`, instead of its own, which is not written to.

        A weight mapped from a file costs more to change in place than to make anew.

        Raises:
            ValueError: it has another shape.
        """
        if weight.shape != self.weight.shape:
            raise ValueError(f"{self.name} is {list(self.weight.shape)}, not {list(weight.shape)}")
        self.module.get_parameter("weight").data = (weight.T if self.transposed else weight).contiguous()


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder blocks in order, as (full name, module).

    They are the one `ModuleList` with as many entries as the config counts layers; where several have
    that length, the one with the most parameters.

    Raises:
        Refusal: an encoder-decoder, or no such list.
    """
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise Refusal(f"{type(model).__name__} is an encoder-decoder; only decoder-only models are served.")
    depth = config.get_text_config().num_hidden_layers
    lists = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth
    ]
    if not lists:
        raise Refusal(
            f"{type(model).__name__} has no list of {depth} blocks; only plain decoders are served."
        )
    _, name, found = max(lists, key=lambda entry: entry[0])
    return [(f"{name}.{i}", block) for i, block in enumerate(found)]


def linears(model: nn.Module, ignore: tuple[str, ...] = (), *, partial: bool = False) -> list[Linear]:
    """Every linear of every block, in definition order, but those `ignore` names.

    Args:
        ignore: block-relative module or parameter names left alone, such as `mlp.gate`.
        partial: to look at the linears there are, whatever else a block holds.

    Raises:
        Refusal: a matrix that is no linear's weight and not ignored, an `ignore` that names nothing, or no
            linear left (but where `partial`).
    """
    from transformers.pytorch_utils import Conv1D

    found: list[Linear] = []
    unhandled: list[str] = []
    named: set[str] = set()
    for block_name, block in blocks(model):
        handled = set()
        for name, module in block.named_modules():
            if not isinstance(module, torch.nn.Linear | Conv1D):
                continue
            handled.add(f"{name}.weight")
            if name in ignore:
                named.add(name)
            else:
                found.append(Linear(block_name, f"{block_name}.{name}", module, isinstance(module, Conv1D)))
        for name, parameter in block.named_parameters():
            if name in ignore:
                named.add(name)
            elif parameter.ndim >= 2 and name not in handled:
                unhandled.append(f"{block_name}.{name} {tuple(parameter.shape)}")
    if unhandled and not partial:
        raise Refusal(
            f"{type(model).__name__} has matrices that are no linear's weight and would be skipped: "
            f"{', '.join(unhandled[:6])}{' ...' if len(unhandled) > 6 else ''} ({len(unhandled)} in all). "
            "List their block-relative names in the recipe's ignore to leave them alone on purpose."
        )
    if unknown := sorted(set(ignore) - named):
        have = sorted({linear.name.removeprefix(f"{linear.block}.") for linear in found})
        raise Refusal(
            f"ignore names no matrix of a block: {', '.join(unknown)}; there are {', '.join(have)}."
        )
    if not found and not partial:
        told = f"ignore names {', '.join(ignore)}; leave some of them out" if ignore else "it has none"
        raise Refusal(f"no linear of {type(model).__name__}'s blocks is left to compress: {told}.")
    return found


def check_length(model: nn.Module, windows: Tensor) -> None:
    """Refuse windows `[n, tokens]` longer than the positions the model knows."""
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and windows.shape[1] > limit:
        raise Refusal(
            f"sequence_length {windows.shape[1]} is more than the {limit} tokens the model reads; lower it "
            "(where items of tasks are read, shots)."
        )


def forward(model: nn.Module, windows: Tensor) -> None:
    """The model's own forward without its output head and without a cache of keys."""
    body: Any = model.base_model
    with torch.no_grad():
        body(input_ids=windows.to(body.get_input_embeddings().weight.device), use_cache=False)
