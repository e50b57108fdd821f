"""What all methods that zero single weights share: how many weights go, in which pattern, spread how."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AfterValidator, model_validator

from stages.compress.method import WeightMethod
from stages.compress.select import Scores, by_pieces, extend_mask, smallest_in_groups
from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.schema import NoData, Sparsity
from stages.model.blocks import Linear, check_divides, linears
from stages.pruning.allocation.kinds import EVENLY, AnyAllocation

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from stages.model.grid import Quantized
    from stages.model.source import Empty


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
    allocation: AnyAllocation = EVENLY
    """How sparsity is spread over linears."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if pattern := self.pattern:
            share = 1 - pattern[0] / pattern[1]
            if abs(self.sparsity - share) > 1e-6:  # 1 - 1/3 has no exact decimal
                raise ValueError(
                    f"structure {self.structure} is a sparsity of {share:g}, not {self.sparsity:g}; "
                    f"set sparsity: {share:g}"
                )
            if self.allocation != EVENLY:
                raise ValueError(f"structure {self.structure} leaves nothing to allocate; drop allocation")
        measured = self.statistic is not None
        self.allocation.check(self.calibration, by_row=self.by_row, batched=measured)
        reads_text = measured or self.allocation.reads_text
        if not (reads_text or isinstance(self.calibration, NoData)):
            raise ValueError("calibration must be {dataset: none}, as no part of this recipe reads text")
        return self

    @property
    def by_row(self) -> bool:
        """Whether weights are compared within their row only, so that all rows lose the same number, +-1."""
        return False

    @property
    def pattern(self) -> tuple[int, int] | None:
        """N and M of `structure`, None if it is unstructured."""
        if self.structure == "unstructured":
            return None
        keep, size = self.structure.split(":")
        return int(keep), int(size)

    def plan(self, source: Empty, windows: Callable[[], Tensor]) -> dict[str, int]:
        """Return the number of zeros of each linear by full name, at least what it has if shares differ.

        Raises:
            Refusal: M of N:M does not divide the input width of some linears.
        """
        targets = linears(source.model, self.ignore)
        if self.pattern:
            size = self.pattern[1]
            cure = "choose an M that divides every input width, or list these linears in ignore"
            check_divides(f"structure {self.structure}: {size}", size, targets, cure)
        batch_size = getattr(self.calibration, "batch_size", None)
        return self.allocation.plan(source, self.ignore, self.sparsity, windows, batch_size)

    def replace(self, linear: Linear, statistic: Any, plan: dict[str, int]) -> Tensor | Quantized:
        """Return the linear's weight with as many zeros as planned."""
        return self.weights(linear.weight, statistic, plan[linear.name])

    def weights(self, weight: Tensor, statistic: Any, zeros: int) -> Tensor | Quantized:
        """Return `weight` `[out, in]` with `zeros` of its entries zeroed, in the pattern of `structure`."""
        raise NotImplementedError

    def pruned(self, weight: Tensor, scores: Scores, zeros: int) -> Tensor:
        """Return `weight` `[out, in]` without the entries of lowest `scores`; survivors keep their values.

        Existing zeros go first. By row, all rows lose the same number, +-1; a row that already has more zeros
        keeps them, and the others lose less. Under a pattern the same holds for every M entries.

        Args:
            zeros: of the result, unless `weight` has more.

        Raises:
            Refusal: a score is NaN.
        """
        gone = weight == 0

        def checked(rows: slice) -> Tensor:
            if (values := scores(rows)).isnan().any():
                raise Refusal(
                    "the scores of some weights are NaN, so they cannot be ranked; nothing was written. "
                    "Check the model for huge weights or inputs."
                )
            return values

        if pattern := self.pattern:
            mask = by_pieces(
                weight,
                lambda rows: smallest_in_groups(checked(rows).masked_fill(gone[rows], -torch.inf), *pattern),
            )
        else:
            mask = extend_mask(checked, gone, zeros, by_row=self.by_row)
        return weight.masked_fill(mask, 0)

    def notes(self, plan: dict[str, int]) -> dict[str, Any]:
        """Return the planned zeros of each linear under an uneven allocation. Scope global is not noted.

        Weights that a grid rounds to zero are not counted.
        """
        return {} if self.allocation.even else {"zeros": plan}
