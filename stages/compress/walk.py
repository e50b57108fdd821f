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

The work on a block is in `stages.compress.block_steps`. A `Home` (`stages.compress.home`) holds its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from tqdm import tqdm

from stages.compress.batches import check_call
from stages.compress.block_steps import BlockSteps, CompressGroup, Prepare
from stages.compress.capture import call_of
from stages.compress.home import Home, InMemory
from stages.compress.statistics import Statistic
from stages.core.errors import Refusal
from stages.core.lazy import mock, torch
from stages.core.memory import cures, exhausted
from stages.model.blocks import Linear, blocks, check_length, device_of, forward, linears

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.corpus.windows import Sequential

TOKENS, CARD_TOKENS = 4096, 2**14
"""Tokens that pass through a block at a time unless a batch size is set, on a CPU and on CUDA."""
Compress: TypeAlias = "Callable[[Linear, Statistic | None], Tensor | None]"
"""(linear, statistic of its inputs) -> its new weight `[out, in]`; None leaves it."""


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
        state = BlockSteps(together, statistic, sequential, size, prepare, home or InMemory(), by_block, bar)
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
        settings = f"lower the calibration's batch_size (now {size}), num_samples or sequence_length"
        raise Refusal(f"there is not enough memory; {cures(error, settings)}.") from error
