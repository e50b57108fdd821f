"""Taking blocks out of a model so that what is left is a plain, smaller checkpoint.

The kept blocks close up, and everything that counts blocks is told: the config's number of layers, its
lists with an entry a layer (`layer_types`), and the `layer_idx` by which a block finds its place in the
cache of keys. The proof is a model built anew from the config as it is written: its blocks must be like
those kept, or the family cannot say such a model and is refused. An attention cannot be left out of a
plain checkpoint at all; its output projection is zeroed instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.model.blocks import Linear, blocks, forward, linears

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

PLAIN = (bool, int, float, str, type(None))


def drop(model: PreTrainedModel, removed: Iterable[int]) -> None:
    """Take the blocks of these numbers out of `model` and its config, in place.

    Raises:
        Refusal: a model built from the shortened config would not have the kept blocks.
    """
    found = blocks(model)
    kept = sorted(set(range(len(found))) - set(removed))
    _shorten(model.config.get_text_config(), kept)
    parent, _, leaf = found[0][0].rpartition(".")[0].rpartition(".")
    setattr(model.get_submodule(parent), leaf, torch.nn.ModuleList(found[number][1] for number in kept))
    for number, (_, block) in enumerate(blocks(model)):
        for module in block.modules():
            if isinstance(vars(module).get("layer_idx"), int):
                vars(module)["layer_idx"] = number
    _check(model)


def _shorten(config: Any, kept: list[int]) -> None:
    """Only the kept layers in a config: their number, and every list with an entry a layer."""
    depth = config.num_hidden_layers
    config.num_hidden_layers = len(kept)
    for key, value in list(vars(config).items()):
        if "layer" in key and isinstance(value, list | tuple) and len(value) == depth:
            setattr(config, key, type(value)(value[number] for number in kept))


def _check(model: PreTrainedModel) -> None:
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM

    family, config = type(model).__name__, model.config
    try:
        written = type(config).from_dict(json.loads(config.to_json_string()))
        with init_empty_weights(include_buffers=False):
            plain = AutoModelForCausalLM.from_config(
                written, attn_implementation=config._attn_implementation
            ).eval()
    except (ValueError, IndexError, StrictDataclassError) as error:
        raise Refusal(f"{family}: its config cannot say a model without these blocks: {error}") from error
    for (name, ours), (_, theirs) in zip(blocks(model), blocks(plain), strict=True):
        if different := _differences(ours, theirs):
            raise Refusal(
                f"{family}: its config cannot say a model without these blocks, {name} would differ in "
                f"{', '.join(different[:4])}; remove others, or none."
            )


def _differences(ours: nn.Module, theirs: nn.Module) -> list[str]:
    """Settings and shapes in which the second module is not like the first, by name."""
    have = dict(ours.named_modules())
    shapes = {name: p.shape for name, p in ours.named_parameters()}
    wanted = {name: p.shape for name, p in theirs.named_parameters()}
    found = [name for name in shapes.keys() | wanted if shapes.get(name) != wanted.get(name)]
    for name, module in theirs.named_modules():
        mine = vars(have[name]) if name in have else {}
        found += [
            f"{name}.{key}".lstrip(".")
            for key, value in vars(module).items()
            if not key.startswith("_")
            and key != "training"
            and isinstance(value, PLAIN)
            and mine.get(key) != value
        ]
    return sorted(found)


def output_projections(model: PreTrainedModel) -> list[Linear]:
    """The linear through which each block's attention leaves, in the order of the blocks.

    It is the last to compute of those in the block's one child that holds a place in the cache of keys.

    Raises:
        Refusal: a block without exactly one such child.
    """
    order: list[nn.Module] = []
    found = linears(model, partial=True)
    handles = [one.module.register_forward_hook(lambda module, *_: order.append(module)) for one in found]
    try:
        forward(model, torch.zeros(1, 2, dtype=torch.long))
    finally:
        for handle in handles:
            handle.remove()
    last = []
    for name, block in blocks(model):
        attention = attention_of(name, block)
        inside = {id(module) for module in attention.modules()}
        (module,) = [module for module in order if id(module) in inside][-1:]
        last.append(next(one for one in found if one.module is module))
    return last


def attention_of(name: str, block: nn.Module) -> nn.Module:
    """The block's attention.

    Raises:
        Refusal: it has none, or several.
    """
    found = [
        child
        for label, child in block.named_children()
        if "att" in label and hasattr(child, "layer_idx") and list(child.parameters())
    ]
    if len(found) != 1:
        raise Refusal(f"{name}: target attention needs one attention a block, this one has {len(found)}.")
    return found[0]


def zero(linear: Linear, bias: Tensor | None) -> None:
    """Zero a linear's weight, and its bias or set that to `bias` `[out]`, in place."""
    linear.weight.zero_()
    held: Any = linear.module.bias
    if held is not None:
        held.data.zero_() if bias is None else held.data.copy_(bias)
