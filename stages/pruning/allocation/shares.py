"""How sparsity is spread over the linears of a model: some may lose more weights than others.

An allocation plans how many weights each linear loses. `Uniform`, the papers' default, takes the same share
of every linear. The others give each linear a share of its own; the mean share, weighted by parameters, is
the target. ERK looks at the shape of each matrix. The rest score the blocks of the model, and all linears of
a block get the same share.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from math import floor, isfinite
from typing import TYPE_CHECKING, ClassVar

from stages.core.errors import Refusal
from stages.core.numbers import apportion, count_of
from stages.core.schema import NoData, Strict
from stages.corpus.windows import Tokens
from stages.model.blocks import Linear, blocks, linears

if TYPE_CHECKING:
    from torch import Tensor

    from stages.model.source import Empty

BISECTIONS = 200
"""More than enough to exhaust the precision of fp64."""

log = logging.getLogger(__name__)


class Allocation(Strict):
    """A way to spread sparsity over linears."""

    even: ClassVar[bool] = False
    """Whether every linear loses the same share."""
    reads_text: ClassVar[bool] = False
    """Whether shares are measured on calibration text."""
    kind: str

    def check(self, calibration: Tokens | NoData, *, by_row: bool, batched: bool) -> None:
        """Refuse a recipe whose other settings do not fit this allocation.

        Args:
            by_row: whether the recipe compares weights within rows.
            batched: whether any other part of the recipe takes windows in batches.

        Raises:
            ValueError: they do not fit.
        """
        if self.reads_text and isinstance(calibration, NoData):
            raise ValueError(f"allocation {self.kind} is measured on text; name a data set in calibration")

    def plan(
        self,
        source: Empty,
        ignore: tuple[str, ...],
        sparsity: float,
        windows: Callable[[], Tensor],
        batch_size: int | None = None,
    ) -> dict[str, int]:
        """Return the number of zeros of each linear that is not ignored, by full name.

        Args:
            windows: makes the calibration windows, see `shares`; called only by allocations that read text.
            batch_size: windows per batch; None chooses as `stages.compress.walk` does.
        """
        shares = self.shares(source, ignore, sparsity, windows() if self.reads_text else None, batch_size)
        targets = linears(source.model, ignore)
        sizes = {linear.name: linear.weight.numel() for linear in targets}
        zeros: dict[str, int] = {}
        for name, block in blocks(source.model):
            with source.block(name, block):
                zeros |= {
                    linear.name: int((linear.weight == 0).sum()) for linear in targets if linear.block == name
                }
        planned = budget(shares, sizes, sparsity, zeros)
        size, total = sum(sizes.values()), sum(planned.values())
        if total > (wanted := count_of(sparsity, size)):
            log.warning(
                "%s: %d of %d weights are already zero, more than the %d of sparsity %g; none is removed",
                source.name, total, size, wanted, sparsity,
            )  # fmt: skip
        return planned

    def shares(
        self,
        source: Empty,
        ignore: tuple[str, ...],
        sparsity: float,
        windows: Tensor | None,
        batch_size: int | None = None,
    ) -> dict[str, float]:
        """Return the share of zeros, in [0, 1], of each linear that is not ignored, by full name.

        Args:
            windows: `[num_samples, sequence_length]` token ids, None for an allocation that reads no text.
        """
        raise NotImplementedError


class BlockAllocation(Allocation):
    """An allocation that gives all linears of a block the same share, by a score of the block.

    Scores are mapped linearly to levels in `span`. The share of a block is a function of its level and of one
    number that is the same for all blocks; bisection finds the number at which the mean share is the target.
    """

    remedy: ClassVar[str]
    """How to change the settings if the blocks cannot lose enough."""

    @property
    def span(self) -> tuple[float, float]:
        """The levels of the blocks with the lowest and the highest score."""
        raise NotImplementedError

    def scores(
        self, source: Empty, ignore: tuple[str, ...], windows: Tensor | None, batch_size: int | None
    ) -> dict[str, float]:
        """Return the score of each block by its full name, in the order of the blocks."""
        raise NotImplementedError

    def levels(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Return the level of each block."""
        return map_scores(self.kind, scores, *self.span)

    def share(self, level: float, number: float) -> float:
        """Return the share of a block, not yet clamped to [0, 1]; it grows with `number`."""
        return level * number

    def shares(
        self,
        source: Empty,
        ignore: tuple[str, ...],
        sparsity: float,
        windows: Tensor | None,
        batch_size: int | None = None,
    ) -> dict[str, float]:
        """Score the blocks and solve for the target."""
        levels = self.levels(self.scores(source, ignore, windows, batch_size))
        return solve(levels, self.share, linears(source.model, ignore), sparsity, self.remedy)


def map_scores(kind: str, scores: Mapping[str, float], low: float, high: float) -> dict[str, float]:
    """Map the scores of blocks linearly, the lowest to `low`, the highest to `high`; equal scores to `low`.

    Args:
        kind: of the allocation, for messages.

    Raises:
        Refusal: a score is not finite.
    """
    if broken := [block for block, score in scores.items() if not isfinite(score)]:
        raise Refusal(
            f"allocation {kind} has no finite score for {', '.join(broken[:8])}; check their weights for NaN "
            "or huge values, or use kind erk or uniform."
        )
    lowest, highest = min(scores.values()), max(scores.values())
    if len(scores) > 1 and highest == lowest:
        log.warning(
            "allocation %s: all %d blocks score %g, so all lose the same share, as under uniform",
            kind, len(scores), lowest,
        )  # fmt: skip
    width = (highest - lowest) or 1.0
    return {block: low + (high - low) * ((score - lowest) / width) for block, score in scores.items()}


def solve(
    levels: Mapping[str, float],
    share: Callable[[float, float], float],
    targets: list[Linear],
    sparsity: float,
    remedy: str,
) -> dict[str, float]:
    """Return the share of each linear by full name, their mean weighted by parameters being `sparsity`.

    Args:
        levels: of the blocks, by full name.
        share: (level, number) -> share of a block before it is clamped to [0, 1]; it grows with the number.
        targets: the linears to prune.
        remedy: what to change in the settings if the target cannot be reached.

    Raises:
        Refusal: the target cannot be reached, as some blocks would not lose enough for any number.
    """
    sizes: Counter[str] = Counter()
    for linear in targets:
        sizes[linear.block] += linear.weight.numel()

    def shares(number: float) -> dict[str, float]:
        return {block: min(max(share(level, number), 0.0), 1.0) for block, level in levels.items()}

    def mean(number: float) -> float:
        by_block = shares(number)
        return sum(by_block[block] * size for block, size in sizes.items()) / sizes.total()

    low, high = -1e3, 1e3
    if (most := mean(high)) < sparsity - 1 / sizes.total():
        raise Refusal(
            f"sparsity {sparsity:g} cannot be reached: under this allocation the blocks lose at most "
            f"{floor(most * 1e4) / 1e4:g} together; use {remedy} or a lower sparsity."
        )
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < sparsity else (low, middle)
    by_block = shares(high)
    return {linear.name: by_block[linear.block] for linear in targets}


def budget(
    shares: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, zeros: dict[str, int]
) -> dict[str, int]:
    """Turn shares into whole numbers of zeros, each within one of its share, that sum to the target exactly.

    A matrix with more zeros than its share keeps them, and the others lose proportionally less.

    Args:
        shares: by name of the matrix.
        sizes: entries of each matrix.
        zeros: of the source; returned as they are if they reach the target by themselves.

    Raises:
        ValueError: a share is outside [0, 1], or their mean by size is not `sparsity`; an allocation's bug.
    """
    total = count_of(sparsity, sum(sizes.values()))
    exact = {name: share * sizes[name] for name, share in shares.items()}
    if not all(0 <= share <= 1 for share in shares.values()) or abs(sum(exact.values()) - total) > 1 + 1e-6:
        raise ValueError(f"shares average {sum(exact.values()) / sum(sizes.values())}, not {sparsity}")
    if sum(zeros.values()) >= total:
        return zeros
    full: set[str] = set()
    while over := {name for name in exact.keys() - full if zeros[name] > exact[name]}:
        full |= over
        left = total - sum(zeros[name] for name in full)
        factor = left / sum(exact[name] for name in exact.keys() - full)
        exact = {name: zeros[name] if name in full else factor * exact[name] for name in exact}
    return apportion(exact, total)
