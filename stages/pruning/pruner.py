"""What every method that zeroes single weights shares: how many zeros, in which pattern, spread how."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AfterValidator, model_validator

from stages.compress.method import WeightMethod
from stages.compress.select import Scores, by_pieces, lowest, smallest_in_groups, whole
from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.numbers import count_of
from stages.core.schema import NoData, Sparsity
from stages.corpus.windows import Tokens
from stages.pruning.allocation import Allocation, LayerIF, Uniform

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from stages.model.blocks import Linear
    from stages.model.grid import Quantized
    from stages.model.stream import Empty

EVENLY = Uniform(kind="uniform")

log = logging.getLogger(__name__)


def _structure(value: str) -> str:
    pair = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", value)
    if value != "unstructured" and not (pair and int(pair[1]) < int(pair[2])):
        raise ValueError("allowed: unstructured, or N:M with N < M, such as 2:4, which keeps 2 of every 4")
    return value


class Pruner(WeightMethod):
    """Zero a share of the weights of every linear."""

    sparsity: Sparsity
    structure: Annotated[str, AfterValidator(_structure)] = "unstructured"
    """`unstructured`, or `N:M`: N of every M consecutive inputs are kept."""
    allocation: Allocation = EVENLY
    """How the share is spread over blocks."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if pattern := self.pattern:
            share = 1 - pattern[0] / pattern[1]
            if abs(self.sparsity - share) > 1e-6:  # 1:3 cannot be written out in full
                raise ValueError(
                    f"structure {self.structure} is a sparsity of {share:g}, not {self.sparsity:g}"
                )
            if self.allocation != EVENLY:
                raise ValueError(f"structure {self.structure} leaves nothing to allocate; drop allocation")
        if self._floors_rows and not self.by_row:
            raise ValueError("floor_rows is for methods that compare weights within rows; leave it out")
        reads = self.allocation.reads_text
        if reads and isinstance(self.calibration, NoData):
            raise ValueError(f"allocation {self.allocation.kind} is measured on text; name one to calibrate")
        if not (reads or self.statistic or isinstance(self.calibration, NoData)):
            raise ValueError("calibration must be {dataset: none}, as nothing here reads text")
        if isinstance(self.allocation, LayerIF) and isinstance(self.calibration, Tokens):
            if self.calibration.num_samples < 2:
                raise ValueError(
                    "allocation layer-if needs num_samples of 2 or more, one to learn and one to be helped"
                )
            used = self.statistic or self.calibration.tokens == "generated"
            if self.calibration.batch_size and not used:
                raise ValueError("allocation layer-if takes one window at a time; leave batch_size out")
        return self

    @property
    def by_row(self) -> bool:
        """Whether weights are compared within their row alone, rows losing as many to within one."""
        return False

    @property
    def _floors_rows(self) -> bool:
        return isinstance(self.allocation, Uniform) and self.allocation.floor_rows

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(kept, of how many), None where unstructured."""
        if self.structure == "unstructured":
            return None
        keep, size = self.structure.split(":")
        return int(keep), int(size)

    def zeros(self, rows: int, columns: int) -> int:
        """How many weights of a matrix go when every matrix loses the same share."""
        if self._floors_rows:
            return rows * count_of(self.sparsity, columns)
        return count_of(self.sparsity, rows * columns)

    def plan(self, source: Empty, windows: Callable[[], Tensor]) -> dict[str, int]:
        """Zeros of each linear by its full name; where they are allocated, no fewer than it has.

        Raises:
            Refusal: M of N:M does not divide some linears' inputs.
        """
        from stages.model.blocks import blocks, linears

        found = linears(source.model, self.ignore)
        shapes = {one.name: (one.weight.shape[0], one.weight.shape[1]) for one in found}
        if self.pattern and (uneven := [n for n, (_, width) in shapes.items() if width % self.pattern[1]]):
            raise Refusal(
                f"structure {self.structure}: {self.pattern[1]} does not divide the input of {len(uneven)} "
                f"linears: {', '.join(uneven[:8])}; list them in ignore or take a divisor."
            )
        if isinstance(self.allocation, Uniform):
            return {name: self.zeros(*shape) for name, shape in shapes.items()}
        at_once = getattr(self.calibration, "batch_size", None)
        text = windows() if self.allocation.reads_text else None
        shares = self.allocation.shares(source, self.ignore, self.sparsity, text, at_once)
        sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
        there: dict[str, int] = {}
        for name, block in blocks(source.model):
            with source.block(name, block):
                there |= {one.name: int((one.weight == 0).sum()) for one in found if one.block == name}
        plan = budget(shares, sizes, self.sparsity, there)
        if (zeros := sum(plan.values())) > (wanted := count_of(self.sparsity, sum(sizes.values()))):
            log.warning(
                "%s: %d of %d weights are zero already, more than the %d that sparsity %g asks for; none go",
                self.source, zeros, sum(sizes.values()), wanted, self.sparsity,
            )  # fmt: skip
        return plan

    def replace(self, linear: Linear, statistic: Any, plan: dict[str, int]) -> Tensor | Quantized:
        """The linear's weight with as many zeros as planned."""
        return self.weights(linear.weight, statistic, plan[linear.name])

    def weights(self, weight: Tensor, statistic: Any, zeros: int) -> Tensor | Quantized:
        """`weight` `[out, in]` with `zeros` of its entries zeroed, in the pattern asked for."""
        raise NotImplementedError

    def pruned(self, weight: Tensor, scores: Scores, zeros: int) -> Tensor:
        """`weight` `[out, in]` without the entries of lowest `scores`; the survivors are untouched.

        `zeros` in all, or as many as it has. By row every row has as many, to within one, but where it had
        more from the start: then the others lose less. Under a pattern, the same within every M.

        Raises:
            Refusal: a score is NaN.
        """
        gone = weight == 0

        def numbers(at: slice) -> Tensor:
            if (made := scores(at)).isnan().any():
                raise Refusal(
                    "the scores of some weights are NaN, so that none is the lowest; nothing was written. "
                    "Look for huge weights or inputs."
                )
            return made

        if pattern := self.pattern:
            mask = by_pieces(
                weight,
                lambda at: smallest_in_groups(numbers(at).masked_fill(gone[at], -torch.inf), *pattern),
            )
        else:
            mask = lowest(numbers, gone, zeros, by_row=self.by_row)
        return weight.masked_fill(mask, 0)

    def notes(self, plan: dict[str, int]) -> dict[str, Any]:
        """The zeros of each linear, where they are not the same share everywhere.

        What a grid rounds to zero beside them is not among them.
        """
        return {} if isinstance(self.allocation, Uniform) else {"zeros": plan}


def budget(
    shares: dict[str, float], sizes: dict[str, int], sparsity: float, there: dict[str, int]
) -> dict[str, int]:
    """Whole numbers of zeros from shares, each within one of its share, summing to the target exactly.

    A matrix that has more zeros than its share keeps them, and the others lose less, in proportion.

    Args:
        there: zeros of the source; where these alone are the target or more, they are the answer.

    Raises:
        ValueError: shares outside [0, 1], or whose mean by size is not `sparsity`; a bug of an allocation.
    """
    total = count_of(sparsity, sum(sizes.values()))
    exact = {name: share * sizes[name] for name, share in shares.items()}
    if not all(0 <= share <= 1 for share in shares.values()) or abs(sum(exact.values()) - total) > 1 + 1e-6:
        raise ValueError(f"shares average {sum(exact.values()) / sum(sizes.values())}, not {sparsity}")
    if sum(there.values()) >= total:
        return there
    full: set[str] = set()
    while over := {name for name in exact.keys() - full if there[name] > exact[name]}:
        full |= over
        left = total - sum(there[name] for name in full)
        part = left / sum(exact[name] for name in exact.keys() - full)
        exact = {name: there[name] if name in full else part * exact[name] for name in exact}
    return whole(exact, total)
