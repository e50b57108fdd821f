"""Removal of blocks from a model, so that a plain, smaller checkpoint is left.

The remaining blocks are renumbered, and everything that counts blocks is updated: the number of layers in the
config, its lists with one entry per layer (`layer_types`), its settings by layer, and the `layer_idx` by
which a block finds its place in the key-value cache. The result is checked against a new model built from the
written config: its blocks must have the shapes and settings of the remaining ones, and the model must run
with a cache. Else the config cannot describe such a model and the removal is refused. A plain checkpoint
cannot omit an attention; its output projection is zeroed instead.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.reading import reason
from stages.model.artifact import as_written
from stages.model.blocks import Linear, blocks, forward, linears

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Target = Literal["block", "attention"]
"""What is removed: whole blocks, or their attention."""
_SETTINGS = (bool, int, float, str, type(None))
"""The types of a module's settings, which must be equal in the model built from the config."""


def remove_blocks(model: PreTrainedModel, removed: Iterable[int]) -> None:
    """Remove the blocks with these numbers from `model` and its config, in place.

    Raises:
        Refusal: a model built from the shortened config would not have the remaining blocks.
    """
    before, config = blocks(model), model.config.get_text_config()
    remaining = sorted(set(range(len(before))) - set(removed))
    cure = _cure(config, remaining)
    _shorten(config, remaining)
    parent, _, leaf = before[0][0].rpartition(".")[0].rpartition(".")
    kept = torch.nn.ModuleList(before[number][1] for number in remaining)
    setattr(model.get_submodule(parent), leaf, kept)
    for number, (_, block) in enumerate(blocks(model)):
        for module in block.modules():
            if isinstance(vars(module).get("layer_idx"), int):
                vars(module)["layer_idx"] = number
    _check(model, cure)


def _cure(config: Any, remaining: list[int]) -> str:
    """Say what to change if a model of these blocks is refused."""
    depth, types = config.num_hidden_layers, list(getattr(config, "layer_types", None) or ())
    if getattr(config, "hidden_size_per_layer_input", None):
        return "its embedding holds a part for each block: use another method"
    for kind in dict.fromkeys(types) if len(types) == depth else ():
        if kind not in {types[number] for number in remaining}:
            numbers = [str(number) for number, each in enumerate(types) if each == kind]
            return f"no block of type {kind} would be left: list one of {', '.join(numbers)} in keep"
    return "remove other blocks or use another method"


def _shorten(config: Any, remaining: list[int]) -> None:
    """Keep only the remaining layers in a config: their number, and what it has by layer."""
    depth = config.num_hidden_layers
    by_layer = config.to_dict().get("per_layer_config")
    config.per_layer_config = None
    config.num_hidden_layers = len(remaining)
    for key, value in list(vars(config).items()):
        if "layer" in key and isinstance(value, list | tuple) and len(value) == depth:
            setattr(config, key, type(value)(value[number] for number in remaining))
    if by_layer is not None:
        settings = {int(number): each for number, each in by_layer.items()}
        config.per_layer_config = {
            place: settings[number] for place, number in enumerate(remaining) if number in settings
        }


def _check(model: PreTrainedModel, cure: str) -> None:
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM

    config = model.config
    refused = f"the config of {type(model).__name__} cannot describe it without these blocks"
    try:
        written = as_written(config)
        with init_empty_weights(include_buffers=False):
            plain = AutoModelForCausalLM.from_config(
                written, attn_implementation=config._attn_implementation
            ).eval()
    except (ValueError, IndexError, KeyError, StrictDataclassError) as error:
        raise Refusal(f"{refused}: {reason(error)}; {cure}.") from error
    for (name, ours), (_, theirs) in zip(blocks(model), blocks(plain), strict=True):
        if differences := _differences(ours, theirs):
            raise Refusal(f"{refused}: {name} would differ in {', '.join(differences[:4])}; {cure}.")
    rest, wanted = _shapes(model), _shapes(plain)
    if differing := [name for name in rest if rest[name] != wanted.get(name)]:
        raise Refusal(f"{refused}: {', '.join(differing[:4])} would have another shape; {cure}.")
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=True)
    except (ValueError, IndexError, KeyError) as error:
        family = type(model).__name__
        raise Refusal(f"{family} does not run without these blocks: {reason(error)}; {cure}.") from error


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def _differences(ours: nn.Module, theirs: nn.Module) -> list[str]:
    """Return the names of settings and of parameter shapes that differ between two modules."""
    modules = dict(ours.named_modules())
    shapes, wanted = _shapes(ours), _shapes(theirs)
    differences = [name for name in shapes.keys() | wanted if shapes.get(name) != wanted.get(name)]
    for name, module in theirs.named_modules():
        settings = vars(modules[name]) if name in modules else {}
        differences += [
            f"{name}.{key}".lstrip(".")
            for key, value in vars(module).items()
            if not key.startswith("_")
            and key != "training"
            and isinstance(value, _SETTINGS)
            and settings.get(key) != value
        ]
    return sorted(differences)


@contextmanager
def without(model: PreTrainedModel, removed: Iterable[int], target: Target) -> Iterator[PreTrainedModel]:
    """Yield a model without these blocks, or with the outputs of their attention zero; it shares all weights.

    Raises:
        Refusal: see `remove_blocks`.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shared = copy.deepcopy(model, memo=tensors)
    with ExitStack() as hooks:
        if target == "attention":
            projections = output_projections(shared)
            for number in removed:
                hooks.enter_context(
                    projections[number].module.register_forward_hook(
                        lambda _, __, output: torch.zeros_like(output)
                    )
                )
        else:
            remove_blocks(shared, removed)
        yield shared


def output_projections(model: PreTrainedModel) -> list[Linear]:
    """Return the linear that computes the output of each block's attention, in the order of the blocks.

    It is the last linear to compute within the attention, see `attention_of`.

    Raises:
        Refusal: a block without exactly one attention.
    """
    by_module = {linear.module: linear for linear in linears(model, partial=True)}
    order: list[nn.Module] = []
    with ExitStack() as hooks:
        for module in by_module:
            hooks.enter_context(module.register_forward_hook(lambda module, *_: order.append(module)))
        forward(model, torch.zeros(1, 2, dtype=torch.long))
    projections = []
    for name, block in blocks(model):
        inside = set(attention_of(name, block).modules())
        projections.append(by_module[[module for module in order if module in inside][-1]])
    return projections


def attention_of(name: str, block: nn.Module) -> nn.Module:
    """Return the block's attention: its only child with `att` in its name, a `layer_idx`, and parameters.

    Args:
        name: of the block, for the message.

    Raises:
        Refusal: the block has none, or several.
    """
    attentions = [
        child
        for label, child in block.named_children()
        if "att" in label and hasattr(child, "layer_idx") and list(child.parameters())
    ]
    if len(attentions) != 1:
        raise Refusal(
            f"target attention needs one attention per block, but {name} has {len(attentions)}; set target: "
            "block."
        )
    return attentions[0]


def zero_linear(linear: Linear, bias: Tensor | None) -> None:
    """Zero a linear's weight, and set its bias to `bias` `[out]` or else zero, in place."""
    linear.weight.zero_()
    current: Any = linear.module.bias
    if current is not None:
        current.data.zero_() if bias is None else current.data.copy_(bias)
