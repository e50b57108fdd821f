"""Running sums of floats on CUDA, which torch computes in no fixed order.

With deterministic algorithms required, `cumsum` of floats raises there. Models call it: OPT and BLOOM to
number the tokens of a row, nucleus sampling to add up probabilities. These tensors are small, so here the
CPU adds them up, in order, and both devices get equal sums.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING

from stages.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@cache
def order_running_sums() -> torch.library.Library:
    """Replace torch's `cumsum` on CUDA by `running_sum`, for the rest of the process."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():  # it says that a kernel is replaced
        warnings.simplefilter("ignore")
        library.impl("cumsum", running_sum, "CUDA")
    return library


def running_sum(values: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return `torch.cumsum(values, dim, dtype=dtype)` on the device of `values`; the CPU adds floats."""
    sums = dtype or (values.dtype if values.is_floating_point() else torch.int64)
    if sums.is_floating_point:
        return values.cpu().cumsum(dim, dtype=sums).to(values.device)
    return torch.cumsum(values, dim, out=torch.empty_like(values, dtype=sums))
