"""The walk over a decoder's blocks: take the statistics of each linear's inputs, then compress the linear.

A calibrated method needs what flows into each linear. Replaying a block by hand means guessing the arguments
its model passes it, which differ by family and by layer. Here the model's own forward runs once over all
calibration windows, and each block's forward is replaced by a step that receives the arguments the model
passes:

- the first window, or the first batch, shows which linears are handed the same tensor (q, k and v; gate and
  up; fused variants count as one), so that such a group shares one statistic, and which module made that
  tensor;
- then the statistics are taken, the linears compressed and the block's output computed, in an order given by
  the calibration's `sequential`:

  - `linear`: each group is compressed just before its first linear computes, so its inputs come from linears
    that are all compressed, within the block as well. One forward.
  - `block`: statistics are taken of the whole block, whose inputs come from compressed blocks; then the block
    is compressed and run again. Two forwards.
  - `none`: every linear sees the dense model's inputs. One forward.

With `block` and `none` a block takes `batch_size` windows at a time, by default about `TOKENS` tokens, and
only what flows between blocks is held for all tokens (0.07 GiB for 64 x 512 tokens of SmolLM2). With `linear`
it takes all windows at once, as a group's statistic needs every token before any of its linears computes.

A `Home` says where a block's weights come from and go to, so one code serves models in memory and models
larger than memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from tqdm import tqdm

from stages.compress.capture import Group, call_of, input_groups, join_outputs, split_call
from stages.compress.causal import by_queries
from stages.compress.statistics import Statistic
from stages.core.errors import Refusal
from stages.core.lazy import mock, torch
from stages.core.numbers import check_finite, finite
from stages.model.blocks import Linear, blocks, check_length, forward, linears

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.corpus.windows import Sequential

TOKENS = 4096
"""Tokens that pass through a block at a time unless a batch size is set."""


Compress: TypeAlias = "Callable[[Linear, Statistic | None], Tensor | None]"
"""(linear, statistic of its inputs) -> its new weight `[out, in]`; None leaves it."""
Prepare = Callable[[list[Group], Callable[[], Any]], None]
"""(groups of a block, the block) -> nothing; called once their statistics are taken, before a linear changes.

The block is a function that returns the output for the window whose inputs the groups hold, computed with the
block's current weights.
"""


class Home(Protocol):
    """Where blocks live while they are not worked on. It refuses weights that are NaN or infinite."""

    def block(self, name: str, block: nn.Module, *, dense: bool = False) -> AbstractContextManager[bool]:
        """Hold the block's weights in memory for the body; yield whether an earlier run finished the block.

        A body that raises leaves nothing behind.

        Args:
            dense: hold the source's weights even of a finished block, so that later blocks see its outputs.
        """


class InMemory:
    """The home of a model that is loaded as a whole."""

    @contextmanager
    def block(self, name: str, block: nn.Module, *, dense: bool = False) -> Iterator[bool]:
        """Check the weights; there is nothing to load or to store."""
        check_finite("the model", block.named_parameters(name))
        yield False


@dataclass
class _Walk:
    """The settings of a walk and the work on one block."""

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
    def weights(self, name: str, block: nn.Module) -> Iterator[bool]:
        """Hold the block's weights in memory; yield whether an earlier run finished the block."""
        with self.home.block(name, block, dense=self.sequential == "none") as done:
            yield done
        self.bar.update()

    @property
    def reuses_first(self) -> bool:
        """Whether the batch that shows the groups also counts for the statistics and the output."""
        return self.sequential != "linear" and not self.prepare

    def step(self, name: str, block: nn.Module, count: int, single: Any) -> Callable[..., Any]:
        """Return the forward that replaces a block's: it compresses the block on its `count` windows."""
        original = block.forward

        def compress_and_run(*args: Any, **kwargs: Any) -> Any:
            size = count if self.sequential == "linear" else self.batch_size
            calls = split_call((args, kwargs), count, size, single)
            with self.weights(name, block) as done:
                if done:
                    return join_outputs(_run(original, calls))
                first = (calls if self.reuses_first else split_call((args, kwargs), count, 1, single))[:1]
                return self.compress_block(name, block, original, calls, first)

        return compress_and_run

    def compress_block(
        self, name: str, block: nn.Module, original: Callable[..., Any], calls: list[Any], first: list[Any]
    ) -> Any:
        """Take the statistics, compress the linears, and return the block's output for all windows.

        Args:
            original: the block's forward.
            calls: the block's calls, one per batch.
            first: the call that shows the groups, on the first batch or on the first window alone.
        """
        outputs: list[Any] = []
        with _about(name):
            groups = input_groups(block, self.linears[name], lambda: outputs.extend(_run(original, first)))
        rest = calls
        if self.reuses_first:
            rest = calls[1:]
            for group in groups:
                self.add(group, group.inputs)
                group.inputs = group.inputs.new_empty(0)
        else:
            outputs.clear()
        handles = [
            group.linears[0].module.register_forward_pre_hook(partial(self.on_inputs, group))
            for group in groups
        ]
        try:
            outputs += _run(original, rest)
        finally:
            for handle in handles:
                handle.remove()
        output = join_outputs(outputs)
        if self.sequential == "linear":  # the groups were compressed on the way
            return output
        if self.prepare:
            self.prepare(groups, lambda: join_outputs(_run(original, first)))
        for group in groups:
            self.compress_group(group)
        return join_outputs(_run(original, calls)) if self.sequential == "block" else output

    def on_inputs(self, group: Group, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Add one call's inputs to the group's statistic, as a hook before the group's first linear.

        With `linear` this call has all windows, so the group is compressed before it computes.
        """
        self.add(group, args[0])
        if self.sequential == "linear":
            self.compress_group(group)

    def add(self, group: Group, inputs: Tensor) -> None:
        """Add `inputs`, `[..., in]`, to the group's statistic."""
        assert self.statistic is not None
        rows = inputs.reshape(-1, inputs.shape[-1])
        if group.statistic is None:
            group.statistic = self.statistic(rows.shape[-1], rows.device)
        group.statistic.add(rows)
        with _about(group.linears[0].name):
            if not group.statistic.finite() and not finite(rows):
                raise Refusal(
                    "its inputs are NaN or infinite; nothing was written. Set run.dtype to bfloat16 or "
                    "float32, or check the source."
                )

    def compress_group(self, group: Group) -> None:
        """Compress the linears of a group and free its statistic."""
        for linear in group.linears:
            self.compress_linear(linear, group.statistic)
        group.statistic = None

    def compress_linear(self, linear: Linear, statistic: Statistic | None) -> None:
        """Give a linear its new weight, if there is one."""
        with _about(linear.name):
            if statistic is not None and not statistic.num_tokens:
                raise Refusal("no token of the calibration text reached it; calibrate on more text.")
            weight = self.compress(linear, statistic)
            if weight is None:
                return
            if not finite(weight := weight.to(linear.weight.dtype)):
                raise Refusal(
                    f"its new weights leave the range of {linear.weight.dtype}; nothing was written. Run in "
                    "float32, lower the sparsity, raise damping, or list the matrix in ignore."
                )
        linear.put(weight)


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
) -> None:
    """Replace the weight of every linear of every block by what `compress` returns for it.

    Args:
        windows: `[num_samples, sequence_length]` token ids; needed with `statistic`.
        statistic: taken of each linear's inputs; None is data-free and runs no forward.
        sequential: what the statistics have seen, see the module's docstring.
        batch_size: windows a block takes at a time; None is as many as have `TOKENS` tokens.
        prepare: called once per block, see `Prepare`; not with `linear`.
        ignore: block-relative names left alone.
        label: shown on the progress bar.
        home: where the weights live; None is in the model itself.

    Raises:
        Refusal: the architecture is not served (see `blocks`, `linears`); weights or inputs are NaN or
            infinite; new weights leave the range of the dtype; the forward never reaches a linear.
    """
    size = batch_size or max(1, TOKENS // (1 if windows is None else windows.shape[1]))
    targets, decoder = linears(model, ignore), blocks(model)
    by_block = {name: [linear for linear in targets if linear.block == name] for name, _ in decoder}
    with torch.no_grad(), tqdm(total=len(decoder), desc=label, unit="block") as bar:
        state = _Walk(compress, statistic, sequential, size, prepare, home or InMemory(), by_block, bar)
        if statistic is None:
            for name, block in decoder:
                with state.weights(name, block) as done:
                    for linear in [] if done else by_block[name]:
                        state.compress_linear(linear, None)
            return

        if windows is None:
            raise ValueError(f"{statistic.__name__} needs calibration windows")
        if sequential == "linear" and prepare:
            raise ValueError("prepare needs sequential block or none")
        check_length(model, windows)
        single = call_of(decoder[0][1], lambda: forward(model, windows[:1]))
        with ExitStack() as patches:
            for name, block in decoder:
                step = state.step(name, block, len(windows), single)
                patches.enter_context(mock.patch.object(block, "forward", step))
            forward(model, windows)


@contextmanager
def _about(name: str) -> Iterator[None]:
    """Begin the text of a refusal with the name of what it is about."""
    try:
        yield
    except Refusal as refusal:
        raise type(refusal)(f"{name}: {refusal}") from refusal


def _run(original: Callable[..., Any], calls: list[tuple[Any, Any]]) -> list[Any]:
    """Return the block's output for each call."""
    with by_queries():
        return [original(*args, **kwargs) for args, kwargs in calls]
