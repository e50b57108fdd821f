"""AlphaPruning (2410.10912): blocks with heavy-tailed spectra are better trained and lose less.

The score of a linear is the exponent of a power law through the upper half of the eigenvalues of W WT (Hill's
estimator); the score of a block is the mean over its linears. Scores are mapped linearly to
[1 - spread, 1 + spread], and shares are proportional to that.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from math import nan
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.numbers import finite
from stages.model.blocks import blocks, linears
from stages.pruning.allocation.shares import BlockAllocation

if TYPE_CHECKING:
    from torch import Tensor

    from stages.model.source import Empty

log = logging.getLogger(__name__)


class Alpha(BlockAllocation):
    """Take less of blocks whose weights have heavy-tailed spectra."""

    remedy: ClassVar[str] = "a smaller spread"
    kind: Literal["alpha"]
    spread: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """The paper's epsilon."""

    @property
    def span(self) -> tuple[float, float]:
        """From 1 - spread to 1 + spread."""
        return 1 - self.spread, 1 + self.spread

    def scores(
        self, source: Empty, ignore: tuple[str, ...], windows: Tensor | None, batch_size: int | None
    ) -> dict[str, float]:
        """Return the mean exponent of each block, from the singular values of every weight.

        Raises:
            Refusal: a block has no matrix with an exponent.
        """
        targets = linears(source.model, ignore)
        exponents: dict[str, list[float]] = defaultdict(list)
        for name, block in blocks(source.model):
            with source.block(name, block):
                for linear in (linear for linear in targets if linear.block == name):
                    if len(eigenvalues := spectrum_of(linear.weight)) > 1:
                        exponents[name].append(hill(eigenvalues))
                    else:
                        log.warning(
                            "allocation alpha: %s has rank %d, no exponent", linear.name, len(eigenvalues)
                        )
        if lacking := sorted({linear.block for linear in targets} - exponents.keys()):
            raise Refusal(
                f"allocation alpha: no matrix of {', '.join(lacking[:8])} has two nonzero singular values "
                "to fit an exponent to; use kind erk or uniform, or list these matrices in ignore."
            )
        return {block: sum(values) / len(values) for block, values in exponents.items()}


def spectrum_of(weight: Tensor) -> Tensor:
    """Return the eigenvalues of W WT, of `weight` `[out, in]`, that fp32 can tell from zero: `[rank]` fp64.

    Two NaN if a weight is not finite.
    """
    if not finite(weight):
        return torch.full((2,), nan, dtype=torch.float64)
    values = torch.linalg.svdvals(weight.float()).double()
    smallest = torch.finfo(torch.float32).eps * max(weight.shape) ** 0.5 * values.amax()
    return values[values > smallest] ** 2


def hill(eigenvalues: Tensor) -> float:
    """Return the exponent of a power law through the upper half of `eigenvalues` `[n]`.

    It is 1 + k / sum ln(l_i / l_k) over the k largest: huge if these are all equal, NaN if a value is not
    finite.
    """
    if not finite(eigenvalues):
        return nan
    ordered = eigenvalues.double().sort().values
    k = max(1, len(ordered) // 2)
    threshold = ordered[-k - 1] if len(ordered) > k else ordered[0]
    logs = (ordered[-k:] / threshold.clamp(min=1e-30)).log().sum()
    return 1 + k / max(float(logs), 1e-12)
