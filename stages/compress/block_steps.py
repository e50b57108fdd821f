"""A block's turn in a walk: the step that replaces its forward takes statistics and compresses its linears.

A step receives the arguments that the model passes to the block, and returns what the block, compressed or
not, would return for them. When statistics are taken and which linears are compressed by then is the matter
of `stages.compress.walk`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from greenlet import getcurrent, greenlet  # type: ignore[import-untyped]

from stages.compress.batches import BatchedCall, check_call, check_rows
from stages.compress.capture import Group, input_groups
from stages.compress.home import Home
from stages.compress.statistics import Statistic
from stages.core.errors import Refusal
from stages.core.numbers import finite
from stages.model.blocks import Linear

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.corpus.windows import Sequential

CompressGroup: TypeAlias = "Callable[[list[Linear], Statistic | None], Iterator[Tensor | None]]"
"""(linears, statistic of the inputs they share) -> an iterator over what `Compress` returns for each."""
Prepare: TypeAlias = "Callable[[list[Group], Callable[[], list[Tensor]]], None]"
"""(groups of a block, the block) -> nothing; called once their statistics are taken, before a linear changes.

The block is a function that returns all tensors that later blocks may read, the hidden states first, for the
window whose inputs the groups hold. They are computed with the block's current weights.
"""


@dataclass
class BlockSteps:
    """The settings of a walk, and the step that replaces a block's forward."""

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
