"""A decoder's blocks and the linears in them, whatever its family.

No model class is named here: the blocks are the longest list of modules that the config counts, and a linear
is a torch linear or GPT-2's Conv1D, which stores its weight transposed. A block's matrix that is not the
weight of a linear (the 3-D experts of a mixture, for example) would be invisible to every method, so it is
refused by name unless the recipe lists it in `ignore`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.model.positions import most_tokens

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Linear:
    """A linear of a decoder block."""

    block: str
    """The full name of its block."""
    name: str
    """Its full name."""
    module: nn.Module
    transposed: bool
    """Whether the module stores its weight as `[in, out]`."""

    @property
    def weight(self) -> Tensor:
        """The weight as `[out, in]`, sharing storage with the module."""
        weight: Tensor = self.module.weight.data  # type: ignore[assignment]
        return weight.T if self.transposed else weight

    def put(self, weight: Tensor) -> None:
        """Replace the module's weight by `weight`, `[out, in]`; the old tensor is not written to.

        Writing to a weight that is mapped from a file would cost more than a new tensor.

        Raises:
            ValueError: the shapes differ.
        """
        if weight.shape != self.weight.shape:
            raise ValueError(f"{self.name} is {list(self.weight.shape)}, not {list(weight.shape)}")
        self.module.get_parameter("weight").data = (weight.T if self.transposed else weight).contiguous()


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the decoder blocks in order, as (full name, module).

    They are the one `ModuleList` with as many entries as the config counts layers; where several have that
    length, one of the text decoder, and of these the one with the most parameters.

    Raises:
        Refusal: the model is an encoder-decoder, has no such list, or keeps the parts of a block in several.
    """
    config: Any = model.config
    family = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise Refusal(f"{family} is an encoder-decoder; only decoder-only models are served.")
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth
    }
    if not sizes:
        raise Refusal(
            f"{family} has no list of {depth or 'as many blocks as its config counts'}; only plain decoders "
            "are served."
        )
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    text = {id(module) for module in decoder.modules()}
    chosen = max(sizes, key=lambda name: (id(model.get_submodule(name)) in text, sizes[name]))
    parent = chosen.rpartition(".")[0]
    parts = [name for name, size in sizes.items() if size and name.rpartition(".")[0] == parent]
    if len(parts) > 1:
        raise Refusal(
            f"{family} keeps the parts of its {depth} blocks in {len(parts)} lists ({', '.join(parts)}), so "
            "no block can be worked on; use a model of a family with one list of blocks, such as Llama."
        )
    list_of_blocks: Any = model.get_submodule(chosen)
    return [(f"{chosen}.{i}", block) for i, block in enumerate(list_of_blocks)]


LEAVE_OUT = "To leave them uncompressed, list their block-relative names in the recipe's ignore."
"""The way out of matrices that no method serves, for recipes that have `ignore`."""


def linears(
    model: nn.Module, ignore: tuple[str, ...] = (), *, partial: bool = False, cure: str = LEAVE_OUT
) -> list[Linear]:
    """Return every linear of every block, in definition order, except those in `ignore`.

    Args:
        ignore: block-relative module or parameter names left alone, such as `mlp.gate`.
        partial: return the linears there are, even if a block holds other matrices or none is left.
        cure: what to do about other matrices, for the message.

    Raises:
        Refusal: a matrix is no linear's weight and not in `ignore`; a name in `ignore` matches nothing; no
            linear is left.
    """
    from transformers.pytorch_utils import Conv1D

    kept: list[Linear] = []
    unserved: list[str] = []
    matched: set[str] = set()
    for block_name, block in blocks(model):
        weights = set()
        for name, module in block.named_modules():
            if not isinstance(module, torch.nn.Linear | Conv1D):
                continue
            weights.add(f"{name}.weight")
            if name in ignore:
                matched.add(name)
            else:
                kept.append(Linear(block_name, f"{block_name}.{name}", module, isinstance(module, Conv1D)))
        for name, parameter in block.named_parameters():
            if name in ignore:
                matched.add(name)
            elif parameter.ndim >= 2 and name not in weights:
                unserved.append(f"{block_name}.{name} {tuple(parameter.shape)}")
    if unserved and not partial:
        raise Refusal(
            f"{type(model).__name__} has matrices that are no linear's weight and would be skipped: "
            f"{', '.join(unserved[:6])}{' ...' if len(unserved) > 6 else ''} ({len(unserved)} in all). {cure}"
        )
    if unknown := sorted(set(ignore) - matched):
        names = sorted({linear.name.removeprefix(f"{linear.block}.") for linear in kept})
        raise Refusal(
            f"ignore names {', '.join(unknown)}, which no block has; its linears are {', '.join(names)}."
        )
    if not kept and not partial:
        reason = f"ignore names {', '.join(ignore)}; remove some of them" if ignore else "it has none"
        raise Refusal(f"no linear of {type(model).__name__}'s blocks is left to compress: {reason}.")
    return kept


def input_widths(model: nn.Module) -> tuple[int, ...]:
    """Return the input widths of the linears in a model's blocks, ascending; empty if it has none."""
    return tuple(sorted({linear.weight.shape[1] for linear in linears(model, partial=True)}))


def check_divides(setting: str, size: int, targets: list[Linear], cure: str) -> None:
    """Refuse a `size` that does not divide the input width of every linear.

    Args:
        setting: the size as the recipe has it, for the message.
        cure: what to change, for the message.

    Raises:
        Refusal: by the names of the linears.
    """
    if uneven := [linear.name for linear in targets if linear.weight.shape[1] % size]:
        raise Refusal(
            f"{setting} does not divide the input width of {len(uneven)} linears: {', '.join(uneven[:8])}; "
            f"{cure}."
        )


def check_length(model: nn.Module, windows: Tensor) -> None:
    """Refuse windows `[n, tokens]` that are longer than the model's positions."""
    limit = most_tokens(model.config)
    if limit is not None and windows.shape[1] > limit:
        raise Refusal(
            f"sequence_length {windows.shape[1]} is more than the {limit} tokens the model reads; lower "
            "sequence_length, or shots if the recipe is calibrated on graded items."
        )


def embedding_rows(model: nn.Module) -> int:
    """Return the number of rows of the embedding, the shortest if there are several.

    Every token id must be below it.
    """
    config: Any = model.config
    text = config.get_text_config()
    rows: int = min(text.vocab_size, getattr(text, "vocab_size_per_layer_input", None) or text.vocab_size)
    return rows


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's embeddings, which text enters first."""
    whole: Any = model
    device: torch.device = whole.get_input_embeddings().weight.device
    return device


def forward(model: nn.Module, windows: Tensor) -> None:
    """Run the model on `windows` without its output head and without a key-value cache."""
    body: Any = model.base_model
    with torch.no_grad():
        body(input_ids=windows.to(device_of(model)), use_cache=False)
