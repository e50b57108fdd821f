"""The integer grid that a sweep over columns rounds to (see `stages.compress.surgeon`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.core.lazy import torch
from stages.model.grid import Codes, Integers

if TYPE_CHECKING:
    from torch import Tensor


class Rounding:
    """The integer grid that columns are rounded to: scales, set a group at a time, and codes.

    Args:
        grid: bits, group size and symmetry.
        work: the weight as it is swept, `[in, out]`.
        dtype: what scales are stored in and values are rounded to.
        order: the column of the weight that each row of `work` is, `[in]` int64; None if they agree.
    """

    def __init__(self, grid: Integers, work: Tensor, dtype: torch.dtype, order: Tensor | None = None) -> None:
        columns, rows = work.shape
        self.grid, self.dtype, self.order = grid, dtype, order
        self.size = grid.group_size or columns
        places = torch.arange(columns, device=work.device) if order is None else order
        self.groups = (places // self.size).int()
        """The group of each row of `work`, `[in]` int32."""
        self.scale = torch.ones(columns // self.size, rows, device=work.device)
        self.zero = None if grid.symmetric else torch.zeros_like(self.scale)
        self.codes = torch.zeros_like(work, dtype=torch.int8)

    def fit(self, group: int, columns: Tensor) -> None:
        """Set scale and zero point of a group to its `columns`, `[group size, out]` fp32."""
        scale, zero = self.grid.fit(columns.T, self.dtype)
        self.scale[group] = scale[:, 0]
        if zero is not None and self.zero is not None:
            self.zero[group] = zero[:, 0]

    def result(self, rows: slice) -> Codes:
        """Return the codes of some rows of the weight, `[rows, in]`, columns in their own order."""
        codes = self.codes[:, rows]
        if self.order is not None:
            codes = torch.empty_like(codes).index_copy_(0, self.order, codes)
        zero = None if self.zero is None else self.zero[:, rows].T
        return self.grid.to_codes(codes.T, self.scale[:, rows].T, zero, self.dtype)
