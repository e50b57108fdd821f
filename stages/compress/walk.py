"""The walk over a decoder's blocks.

A calibrated method needs, for each linear, what flows into it. Replaying a block by hand means guessing
the arguments its model passes it, which differ by family and by layer. Here the model's own forward runs
once over all calibration windows, and each block's forward is stood in for by a step that has the very
arguments the model passed:

- one window through the block, or its first batch, notes which linears are handed the same tensor (q, k and
  v; gate and up; fused variants count as one), so that such a group shares one statistic, and which module
  made it;
- then the statistics are taken, the linears compressed, and the block's output computed. How the two
  mix is the calibration's `sequential`:

  - `linear`: each group is compressed just before its first linear computes, from inputs already
    compressed upstream, inside the block as well. One forward in all.
  - `block`: statistics of the whole block first, from inputs compressed in the blocks before it; then
    the block is compressed and run again. Two forwards.
  - `none`: every linear sees the dense model's inputs. One forward.

With `block` and `none` a block takes `batch_size` windows at a time, or about `TOKENS` tokens, and only what flows
between blocks is held for all tokens (0.07 GiB for 64 x 512 tokens of SmolLM2). With `linear` it takes all windows
at once, as a group's statistic needs every token before any of its linears computes.

A `Home` says where a block's weights come from and go to, so that a model larger than memory passes
through the same code as one that is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from tqdm import tqdm

from stages.compress.calls import arguments, joined, split
from stages.compress.causal import by_queries
from stages.compress.groups import Group, input_groups
from stages.compress.statistics import Statistic
from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.numbers import check_finite, finite
from stages.model.blocks import Linear, blocks, check_length, forward, linears

if TYPE_CHECKING:
    from torch import Tensor, nn

TOKENS = 4096
"""Passed through a block at a time where nothing else is asked for."""
Sequential = Literal["linear", "block", "none"]
"""What a linear's statistic has seen: see the module's docstring."""


Compress: TypeAlias = "Callable[[Linear, Statistic | None], Tensor | None]"
"""(linear, statistic of its inputs) -> its new weight `[out, in]`; None leaves it."""
Prepare = Callable[[list[Group], Callable[[], Any]], None]
"""What is done to a block's groups, their statistics taken, before any of its linears is compressed.

Beside the groups it is given the block as a function: called, it returns the output for the window that
the groups hold the inputs of, in the weights as they are by then.
"""


class Home(Protocol):
    """Where blocks live while nothing is done to them. It refuses weights that are NaN or infinite."""

    def block(self, name: str, block: nn.Module, *, dense: bool = False) -> AbstractContextManager[bool]:
        """Hold the block's weights in memory for the body; yields whether the block was finished before.

        A body that raises leaves nothing behind.

        Args:
            dense: hold the source's weights even of a finished one, for the blocks after to see its outputs.
        """


class InMemory:
    """The home of a model that is loaded as a whole."""

    @contextmanager
    def block(self, name: str, block: nn.Module, *, dense: bool = False) -> Iterator[bool]:
        """Nothing to fetch or to put away; its weights are looked at."""
        check_finite("the model", block.named_parameters(name))
        yield False


@dataclass
class _Walk:
    """What is done at every block."""

    compress: Compress
    statistic: type[Statistic] | None
    sequential: Sequential
    batch_size: int
    prepare: Prepare | None
    home: Home
    linears: Mapping[str, list[Linear]]
    """By the name of their block."""
    bar: Any

    @contextmanager
    def at(self, name: str, block: nn.Module) -> Iterator[bool]:
        """Hold the block's weights in memory; yields whether the block was finished before."""
        with self.home.block(name, block, dense=self.sequential == "none") as done:
            yield done
        self.bar.update()

    @property
    def once(self) -> bool:
        """Whether the first batch tells the groups and is computed once: where none waits for another."""
        return self.sequential != "linear" and not self.prepare

    def step(self, name: str, block: nn.Module, count: int, single: Any) -> Callable[..., Any]:
        """The forward that stands in for a block's: compress it on `count` windows, return its output."""
        original = block.forward

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            together = count if self.sequential == "linear" else self.batch_size
            calls = split((args, kwargs), count, together, single)
            with self.at(name, block) as done:
                if done:
                    return joined(_run(original, calls))
                first = (calls if self.once else split((args, kwargs), count, 1, single))[:1]
                return self.compressed(name, block, original, calls, first)

        return stand_in

    def compressed(
        self, name: str, block: nn.Module, original: Callable[..., Any], calls: list[Any], first: list[Any]
    ) -> Any:
        """Take the statistics, compress the linears, and return the block's output for all windows.

        Args:
            original: the block's forward.
            calls: its calls, a batch each.
            first: the one that tells the groups, a batch or the first window alone.
        """
        outputs: list[Any] = []
        with _about(name):
            groups = input_groups(block, self.linears[name], lambda: outputs.extend(_run(original, first)))
        rest = calls
        if self.once:
            rest = calls[1:]
            for group in groups:
                self.add(group, group.inputs)
                group.inputs = group.inputs.new_empty(0)
        else:
            outputs.clear()
        handles = [
            group.linears[0].module.register_forward_pre_hook(partial(self.take, group)) for group in groups
        ]
        try:
            outputs += _run(original, rest)
        finally:
            for handle in handles:
                handle.remove()
        output = joined(outputs)
        if self.sequential == "linear":  # each group was settled as the block came to it
            return output
        if self.prepare:
            self.prepare(groups, lambda: joined(_run(original, first)))
        for group in groups:
            self.settle(group)
        return joined(_run(original, calls)) if self.sequential == "block" else output

    def take(self, group: Group, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Add the inputs of one call to the group's statistic; a hook before the group's first linear.

        With `linear` the call has all windows, so the group's linears are compressed before they compute.
        """
        self.add(group, args[0])
        if self.sequential == "linear":
            self.settle(group)

    def add(self, group: Group, inputs: Tensor) -> None:
        """Take `inputs`, `[..., in]`, into the group's statistic."""
        assert self.statistic is not None
        rows = inputs.reshape(-1, inputs.shape[-1])
        if group.statistic is None:
            group.statistic = self.statistic(rows.shape[-1], rows.device)
        group.statistic.add(rows)
        with _about(group.linears[0].name):
            if not group.statistic.finite() and not finite(rows):
                raise Refusal("NaN or infinite inputs; nothing was written.")

    def settle(self, group: Group) -> None:
        """Compress the linears of a group, and give up its statistic."""
        for linear in group.linears:
            self.replace(linear, group.statistic)
        group.statistic = None

    def replace(self, linear: Linear, statistic: Statistic | None) -> None:
        with _about(linear.name):
            if statistic is not None and not statistic.num_tokens:
                raise Refusal("no token of the calibration text reached it; calibrate on more text.")
            made = self.compress(linear, statistic)
            if made is None:
                return
            if not finite(made := made.to(linear.weight.dtype)):
                raise Refusal(
                    f"the new weights leave the range of {linear.weight.dtype}; nothing was written. Run in "
                    "float32, take a lower sparsity or more damping, or list the matrix in ignore."
                )
        linear.put(made)


def walk(
    model: nn.Module,
    compress: Compress,
    *,
    windows: Tensor | None = None,
    statistic: type[Statistic] | None = None,
    sequential: Sequential = "linear",
    batch_size: int | None = None,
    prepare: Prepare | None = None,
    ignore: tuple[str, ...] = (),
    label: str = "walk",
    home: Home | None = None,
) -> int:
    """Replace the weight of every linear of every block by `compress` of it.

    Args:
        windows: `[num_samples, sequence_length]` token ids; needed when `statistic` is given.
        statistic: what to take from each linear's inputs; None is data-free and runs no forward.
        sequential: what the statistics have seen, see the module's docstring.
        batch_size: windows a block takes at a time; None is as many as have `TOKENS` tokens.
        prepare: called once a block, see `Prepare`; not with `linear`.
        ignore: block-relative names left alone.
        label: shown on the progress bar.
        home: where the weights live; None is in the model itself.

    Returns:
        The number of linears there are to compress.

    Raises:
        Refusal: unserved architectures (see `blocks`, `linears`), NaN or infinite weights or inputs, new
            weights that the dtype does not hold, a linear that the forward never reaches.
    """
    size = batch_size or max(1, TOKENS // (1 if windows is None else windows.shape[1]))
    found, named = linears(model, ignore), blocks(model)
    within = {name: [one for one in found if one.block == name] for name, _ in named}
    with torch.no_grad(), tqdm(total=len(named), desc=label, unit="block") as bar:
        state = _Walk(compress, statistic, sequential, size, prepare, home or InMemory(), within, bar)
        if statistic is None:
            for name, block in named:
                with state.at(name, block) as done:
                    for linear in [] if done else within[name]:
                        state.replace(linear, None)
            return len(found)

        if windows is None:
            raise ValueError(f"{statistic.__name__} needs calibration windows")
        if sequential == "linear" and prepare:
            raise ValueError("preparation needs sequential block or none")
        check_length(model, windows)
        single = arguments(named[0][1], lambda: forward(model, windows[:1]))
        for name, block in named:
            block.forward = state.step(name, block, len(windows), single)
        try:
            forward(model, windows)
        finally:
            for _, block in named:
                del block.forward
    return len(found)


@contextmanager
def _about(name: str) -> Iterator[None]:
    """A refusal says what it is about."""
    try:
        yield
    except Refusal as refusal:
        raise type(refusal)(f"{name}: {refusal}") from refusal


def _run(original: Callable[..., Any], calls: list[tuple[Any, Any]]) -> list[Any]:
    """The block's output for every call, one after the other."""
    with by_queries():
        return [original(*args, **kwargs) for args, kwargs in calls]
