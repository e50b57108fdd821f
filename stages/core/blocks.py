"""The walk over a decoder's blocks; the only code that knows hooks.

A calibrated method needs, for each linear, what flows into it. Replaying a block by hand means guessing
the arguments its model passes it, which differ by family and by layer. Here the model's own forward
runs once over all calibration windows and hooks do the rest:

- a dry run on a few tokens notes which linears are handed the very same tensor (q, k and v; gate and
  up; fused variants count as one), so that each such group shares one statistic;
- in the real run, before a group's first linear computes, its statistic is taken from the input, and
  each linear of the group is compressed just before its own forward. Everything downstream therefore
  sees inputs already compressed upstream, at the cost of one forward in all.

All calibration tokens pass at once, so activations of `num_samples * sequence_length` tokens must fit
in memory (about 0.3 GiB for 64 x 512 tokens and SmolLM2); the output head is not run.

A matrix of a block that is not the weight of a linear (the 3-D experts of a mixture, say) is invisible
to such hooks. It is refused by name unless the recipe lists it in `ignore`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from stages.core.errors import Refusal
from stages.core.statistics import Statistic

Compress = Callable[[str, Tensor, Statistic | None], Tensor]
"""(linear's full name, weight `[out, in]`, statistic of its inputs) -> new weight, same shape."""


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
        if isinstance(module, nn.ModuleList) and len(module) == depth
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
        Refusal: a matrix that is no linear's weight and not ignored, or an `ignore` that names nothing.
    """
    found: list[Linear] = []
    unhandled: list[str] = []
    named: set[str] = set()
    for block_name, block in blocks(model):
        handled = set()
        for name, module in block.named_modules():
            if not isinstance(module, nn.Linear | Conv1D):
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
    return found


def input_groups(model: nn.Module, found: list[Linear]) -> dict[str, int]:
    """Which linears are handed the same tensor: full name -> group number, by a dry run on four tokens.

    Raises:
        Refusal: a linear that the model's forward never reaches.
    """
    groups: dict[str, int] = {}
    seen: dict[int, tuple[int, Tensor]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            # The tensor is kept so that its id cannot be used again within the run.
            groups[name] = seen.setdefault(id(args[0]), (len(seen), args[0]))[0]

        return hook

    handles = [linear.module.register_forward_pre_hook(note(linear.name)) for linear in found]
    try:
        _forward(model, torch.zeros(1, 4, dtype=torch.long, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    if missed := [linear.name for linear in found if linear.name not in groups]:
        raise Refusal(f"the model's forward never reaches {', '.join(missed)}; list them in ignore.")
    return groups


def walk(
    model: nn.Module,
    compress: Compress,
    *,
    windows: Tensor | None = None,
    statistic: type[Statistic] | None = None,
    ignore: tuple[str, ...] = (),
    label: str = "walk",
) -> int:
    """Replace the weight of every linear of every block by `compress` of it, in place.

    Args:
        windows: `[num_samples, sequence_length]` token ids; needed when `statistic` is given.
        statistic: what to take from each linear's inputs; None is data-free and runs no forward.
        ignore: block-relative names left alone.
        label: shown on the progress bar and in what is raised.

    Returns:
        The number of linears compressed.

    Raises:
        Refusal: unserved architectures (see `blocks`, `linears`), NaN or infinite weights or inputs.
    """
    found = linears(model, ignore)
    if broken := [linear.name for linear in found if not linear.weight.isfinite().all()]:
        raise Refusal(f"{label}: NaN or infinite weights in {', '.join(broken)}; nothing was compressed.")

    def replace(linear: Linear, value: Statistic | None) -> None:
        try:
            linear.weight.copy_(compress(linear.name, linear.weight, value))
        except Refusal as refusal:
            raise Refusal(f"{label}: {linear.name}: {refusal}") from refusal

    with torch.no_grad(), tqdm(total=len(blocks(model)), desc=label, unit="block") as bar:
        if statistic is None:
            for block_name, _ in blocks(model):
                for linear in found:
                    if linear.block == block_name:
                        replace(linear, None)
                bar.update()
            return len(found)

        if windows is None:
            raise ValueError(f"{statistic.__name__} needs calibration windows")
        check_length(model, windows, label)
        groups = input_groups(model, found)
        waiting = {number: list(groups.values()).count(number) for number in set(groups.values())}
        ready: dict[int, Statistic] = {}

        def before(linear: Linear) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                group = groups[linear.name]
                if group not in ready:
                    inputs = args[0].reshape(-1, args[0].shape[-1])
                    if not inputs.isfinite().all():
                        raise Refusal(f"{label}: {linear.name}: NaN or infinite inputs; nothing was written.")
                    ready[group] = statistic(inputs.shape[-1], inputs.device)
                    ready[group].add(inputs)
                replace(linear, ready[group])
                waiting[group] -= 1
                if not waiting[group]:
                    del ready[group]

            return hook

        def advance(*_: object) -> None:  # a hook's return value would replace the block's output
            bar.update()

        handles = [linear.module.register_forward_pre_hook(before(linear)) for linear in found]
        handles += [block.register_forward_hook(advance) for _, block in blocks(model)]
        try:
            _forward(model, windows)
        finally:
            for handle in handles:
                handle.remove()
    return len(found)


def check_length(model: nn.Module, windows: Tensor, label: str) -> None:
    """Refuse windows longer than the positions the model knows."""
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and windows.shape[1] > limit:
        raise Refusal(
            f"{label}: sequence_length {windows.shape[1]} is more than the {limit} tokens the model reads."
        )


def _forward(model: nn.Module, windows: Tensor) -> None:
    """The model's own forward without its output head and without a cache of keys."""
    body: Any = model.base_model
    with torch.no_grad():
        body(input_ids=windows.to(next(model.parameters()).device), use_cache=False)
