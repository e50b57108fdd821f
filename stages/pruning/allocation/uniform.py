"""The same sparsity everywhere, as in the papers that introduce pruning methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from stages.core.numbers import count_of
from stages.core.schema import NoData
from stages.corpus.windows import Tokens
from stages.model.blocks import linears
from stages.pruning.allocation.shares import Allocation

if TYPE_CHECKING:
    from torch import Tensor

    from stages.model.source import Empty


class Uniform(Allocation):
    """Take the same share of every linear."""

    even: ClassVar[bool] = True
    kind: Literal["uniform"]
    floor_rows: bool = False
    """Zero floor(columns * sparsity) weights of every row, as the authors' code of Wanda does, for methods
    that compare weights within rows. A matrix then loses less than the target unless it divides evenly."""

    def check(self, calibration: Tokens | NoData, *, by_row: bool, batched: bool) -> None:
        """Refuse `floor_rows` where weights are not compared within rows."""
        if self.floor_rows and not by_row:
            raise ValueError("floor_rows is for methods that compare weights within rows; leave it out")

    def zeros(self, sparsity: float, rows: int, columns: int) -> int:
        """Return how many weights a matrix loses."""
        if self.floor_rows:
            return rows * count_of(sparsity, columns)
        return count_of(sparsity, rows * columns)

    def plan(
        self,
        source: Empty,
        ignore: tuple[str, ...],
        sparsity: float,
        windows: Callable[[], Tensor],
        batch_size: int | None = None,
    ) -> dict[str, int]:
        """Return the number of zeros of each linear that is not ignored, by full name."""
        return {
            linear.name: self.zeros(sparsity, *linear.weight.shape)
            for linear in linears(source.model, ignore)
        }
