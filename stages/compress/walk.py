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

A block takes `batch_size` windows at a time, by default about `TOKENS` tokens, or `CARD_TOKENS` on CUDA.
Free memory plays no part, as the last bits of results depend on the size. What flows between blocks is held
for all tokens, on the device (0.07 GiB for 64 x 512 tokens of SmolLM2). With `linear` a group's statistic
needs every token before any of its linears computes. So each batch pauses before a group until all have
reached it, and what they hold of the block until then adds up; on a CPU all windows are one batch by
default.

To read a number from a card, a program must wait until all work queued there is done. So a block's batches
read none: inputs are checked when their statistic is complete.

A `Home` says where a block's weights come from and go to, so one code serves models in memory and models
larger than memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from greenlet import getcurrent, greenlet  # type: ignore[import-untyped]
from tqdm import tqdm

from stages.compress.batches import BatchedCall, check_call, check_rows
from stages.compress.capture import Group, call_of, input_groups
from stages.compress.statistics import Statistic
from stages.core.errors import Refusal
from stages.core.lazy import mock, torch
from stages.core.memory import exhausted
from stages.core.numbers import check_finite, finite
from stages.model.blocks import Linear, blocks, check_length, device_of, forward, linears

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.corpus.windows import Sequential

TOKENS, CARD_TOKENS = 4096, 2**14
"""Tokens that pass through a block at a time unless a batch size is set, on a CPU and on CUDA."""


Compress: TypeAlias = "Callable[[Linear, Statistic | None], Tensor | None]"
"""(linear, statistic of its inputs) -> its new weight `[out, in]`; None leaves it."""
CompressGroup: TypeAlias = "Callable[[list[Linear], Statistic | None], Iterator[Tensor | None]]"
"""(linears, statistic of the inputs they share) -> an iterator over what `Compress` returns for each."""
Prepare: TypeAlias = "Callable[[list[Group], Callable[[], list[Tensor]]], None]"
"""(groups of a block, the block) -> nothing; called once their statistics are taken, before a linear changes.

The block is a function that returns all tensors that later blocks may read, the hidden states first, for the
window whose inputs the groups hold. They are computed with the block's current weights.
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

    compress: CompressGroup
    statistic: type[Statistic] | None
    sequential: Sequential
    batch_size: int
    prepare: Prepare | None
    home: Home
    linears: Mapping[str, list[Linear]]
    """By the name of their block."""
    bar: Any
    reached: set[str] = field(default_factory=set)
    """Blocks whose forward ran."""

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
            check_call(name, (args, kwargs))
            if not self.reached:
                check_rows(name, (args, kwargs), single)
            if name in self.reached:
                raise Refusal(f"the model passes more than once through {name}; use a data-free method.")
            self.reached.add(name)
            batches = BatchedCall((args, kwargs), count, self.batch_size, single)
            with self.weights(name, block) as done:
                if not done:
                    first = batches if self.reuses_first else BatchedCall((args, kwargs), count, 1, single)
                    self.compress_block(name, block, original, batches, first)
                if done or self.sequential == "block":
                    _run(original, batches)
                return batches.join()

        return compress_and_run

    def compress_block(
        self,
        name: str,
        block: nn.Module,
        original: Callable[..., Any],
        batches: BatchedCall,
        first: BatchedCall,
    ) -> None:
        """Take the statistics, running every batch, and compress the linears.

        Args:
            original: the block's forward.
            first: the batch that shows the groups is its number 0; `batches`, or windows one at a time.
        """
        with _about(name):
            groups = input_groups(block, self.linears[name], lambda: first.run(original, 0))
        if self.reuses_first:
            for group in groups:
                self.add(group, group.inputs)
                group.inputs = group.inputs.new_empty(0)
        handles = [
            group.linears[0].module.register_forward_pre_hook(partial(self.on_inputs, group))
            for group in groups
        ]
        try:
            if self.sequential == "linear":
                self.run_in_step(name, original, batches)
            else:
                _run(original, batches, start=1 if self.reuses_first else 0)
        finally:
            for handle in handles:
                handle.remove()
        if self.sequential == "linear":  # the groups were compressed on the way
            return
        if self.prepare:
            self.prepare(groups, lambda: first.effects(original, 0))
        for group in groups:
            self.finish(group)

    def run_in_step(self, name: str, original: Callable[..., Any], batches: BatchedCall) -> None:
        """Run all batches from group to group, and compress each group when every batch stands before it.

        Each batch is a greenlet, a call that can pause and continue. `on_inputs` pauses it.
        """
        running = [greenlet(partial(batches.run, original, number)) for number in range(len(batches))]
        while True:
            reached = [batch.switch() for batch in running]
            if all(batch.dead for batch in running):
                return
            if any(batch.dead for batch in running) or any(group is not reached[0] for group in reached):
                raise Refusal(
                    f"{name} runs its linears in another order for some windows; set sequential: block or "
                    f"none, or a batch_size of num_samples."
                )
            self.finish(reached[0])

    def on_inputs(self, group: Group, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Add one batch's inputs to the group's statistic, as a hook before the group's first linear.

        With `linear` the batch then pauses, as the group is compressed before it computes.
        """
        self.add(group, args[0])
        if self.sequential == "linear":
            getcurrent().parent.switch(group)

    def add(self, group: Group, inputs: Tensor) -> None:
        """Add `inputs`, `[..., in]`, to the group's statistic."""
        assert self.statistic is not None
        rows = inputs.reshape(-1, inputs.shape[-1])
        if group.statistic is None:
            group.statistic = self.statistic(rows.shape[-1], rows.device)
        group.statistic.add(rows)

    def finish(self, group: Group) -> None:
        """Check the group's statistic, which has seen every token, and compress the group."""
        with _about(group.linears[0].name):
            if group.statistic is not None and not group.statistic.finite():
                raise Refusal(
                    "its inputs are NaN or infinite, or their squares overflow fp32; nothing was written. "
                    "Set run.dtype to bfloat16 or float32, or check the source for broken activations."
                )
        self.compress_group(group)

    def compress_group(self, group: Group) -> None:
        """Compress the linears of a group and free its statistic."""
        self.compress_linears(group.linears, group.statistic)
        group.statistic = None

    def compress_linears(self, linears: list[Linear], statistic: Statistic | None) -> None:
        """Give linears that share a statistic their new weights, where there are any."""
        weights = self.compress(linears, statistic)
        for linear in linears:
            with _about(linear.name):
                if statistic is not None and not statistic.num_tokens:
                    raise Refusal("no token of the calibration text reached it; calibrate on more text.")
                weight = next(weights)
                if weight is None:
                    continue
                if not finite(weight := weight.to(linear.weight.dtype)):
                    raise Refusal(
                        f"its new weights leave the range of {linear.weight.dtype}; nothing was written. "
                        "Run in float32, lower the sparsity, raise damping, or list the matrix in ignore."
                    )
            linear.put(weight)


def walk(
    model: nn.Module,
    compress: Compress | CompressGroup,
    *,
    by_group: bool = False,
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
        by_group: whether `compress` takes all linears that share a statistic, see `CompressGroup`.
        windows: `[num_samples, sequence_length]` token ids; needed with `statistic`.
        statistic: taken of each linear's inputs; None is data-free and runs no forward.
        sequential: what the statistics have seen, see the module's docstring.
        batch_size: windows a block takes at a time; None chooses, see `default_batch_size`.
        prepare: called once per block, see `Prepare`; not with `linear`.
        ignore: block-relative names left alone.
        label: shown on the progress bar.
        home: where the weights live; None is in the model itself.

    Raises:
        Refusal: the architecture is not served (see `blocks`, `linears`, `check_call`); weights or inputs are
            NaN or infinite; new weights leave the range of the dtype; the forward never reaches a linear or
            a block, or reaches it twice; memory runs out.
    """
    together: Any = compress if by_group else _each(compress)
    size = batch_size or (1 if windows is None else default_batch_size(model, windows, sequential))
    targets, decoder = linears(model, ignore), blocks(model)
    by_block = {name: [linear for linear in targets if linear.block == name] for name, _ in decoder}
    with torch.no_grad(), tqdm(total=len(decoder), desc=label, unit="block") as bar:
        state = _Walk(together, statistic, sequential, size, prepare, home or InMemory(), by_block, bar)
        if statistic is None:
            for name, block in decoder:
                with state.weights(name, block) as done:
                    if not done:
                        state.compress_linears(by_block[name], None)
            return

        if windows is None:
            raise ValueError(f"{statistic.__name__} needs calibration windows")
        if sequential == "linear" and prepare:
            raise ValueError("prepare needs sequential block or none")
        check_length(model, windows)
        single = call_of(decoder[0][1], lambda: forward(model, windows[:1]))
        check_call(decoder[0][0], single)
        with ExitStack() as patches:
            for name, block in decoder:
                step = state.step(name, block, len(windows), single)
                patches.enter_context(mock.patch.object(block, "forward", step))
            with _refusing_out_of_memory(size):
                forward(model, windows)
        if missed := [name for name, _ in decoder if name not in state.reached]:
            raise Refusal(
                f"text never reaches {', '.join(missed[:4])} of {type(model).__name__}; use a data-free "
                "method."
            )


def _each(compress: Any) -> CompressGroup:
    """Let a `Compress` take the linears of a group."""
    return lambda linears, statistic: (compress(linear, statistic) for linear in linears)


def default_batch_size(model: nn.Module, windows: Tensor, sequential: Sequential) -> int:
    """Return how many of the windows `[n, tokens]` a block takes at a time where a recipe does not say.

    It depends on the kind of device, which is recorded, and not on free memory.
    """
    if device_of(model).type == "cuda":
        return max(1, CARD_TOKENS // windows.shape[1])
    return len(windows) if sequential == "linear" else max(1, TOKENS // windows.shape[1])


@contextmanager
def _refusing_out_of_memory(size: int) -> Iterator[None]:
    """Turn an out-of-memory error of any device into a refusal that says which settings need less.

    It is raised outside `Home.block`, so finished blocks stay for a run that has more memory.
    """
    try:
        yield
    except Exception as error:
        if not exhausted(error):
            raise
        raise Refusal(
            f"there is not enough memory; lower the calibration's batch_size (now {size}), num_samples or "
            "sequence_length."
        ) from error


@contextmanager
def _about(name: str) -> Iterator[None]:
    """Begin the text of a refusal with the name of what it is about."""
    try:
        yield
    except Refusal as refusal:
        raise type(refusal)(f"{name}: {refusal}") from refusal


def _run(original: Callable[..., Any], batches: BatchedCall, start: int = 0) -> None:
    """Run the block on every batch from number `start` on."""
    for number in range(start, len(batches)):
        batches.run(original, number)
