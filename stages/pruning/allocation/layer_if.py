"""LayerIF (2505.23811): prune a block less, the more its gradients on training text help held-out text.

Influence is DataInf's closed form (2310.00902): with g_i the gradients of the first half of the windows and v
the mean gradient of the second half, both of one block, window k has the influence

    sum_i (v.g_k - (v.g_i)(g_i.g_k) / (damping + |g_i|^2)) / (n * damping)

where damping is a tenth of the mean square entry of the gradients. The score of a block is the sum of its
positive influences. Scores are scaled to [0, 1] and smoothed over blocks (Savitzky-Golay, window 5, order 2;
not with fewer than five blocks); shares are proportional to a value that falls from `high` at 0 to `low` at
1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.core.lazy import torch
from stages.core.schema import NoData
from stages.corpus.windows import Tokens
from stages.model.blocks import blocks, linears
from stages.pruning.allocation.shares import BlockAllocation
from stages.pruning.gradients import sketches

if TYPE_CHECKING:
    from torch import Tensor

    from stages.model.source import Empty

WINDOW, ORDER = 5, 2
"""Of the Savitzky-Golay filter."""


class LayerIF(BlockAllocation):
    """Take less of blocks with much influence on held-out text."""

    reads_text: ClassVar[bool] = True
    remedy: ClassVar[str] = "a larger low"
    kind: Literal["layer-if"]
    low: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """The share of the most influential block, before all shares are rescaled to the target."""
    high: Annotated[float, Field(gt=0, lt=1)] = 0.40
    """The share of the least influential block, likewise."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low must be below high; got {self.low:g} and {self.high:g}")
        return self

    def check(self, calibration: Tokens | NoData, *, by_row: bool, batched: bool) -> None:
        """Refuse fewer than two windows, and a `batch_size` that nothing uses."""
        super().check(calibration, by_row=by_row, batched=batched)
        assert isinstance(calibration, Tokens)
        if calibration.num_samples < 2:
            raise ValueError(
                "allocation layer-if needs num_samples of 2 or more, as half the windows are held out"
            )
        if calibration.batch_size and not (batched or calibration.tokens == "generated"):
            raise ValueError("allocation layer-if takes one window at a time; leave batch_size out")

    @property
    def span(self) -> tuple[float, float]:
        """From 0 to 1."""
        return 0.0, 1.0

    def scores(
        self, source: Empty, ignore: tuple[str, ...], windows: Tensor | None, batch_size: int | None
    ) -> dict[str, float]:
        """Return the influence of each block, from one forward and backward per window of the whole model."""
        assert windows is not None
        names = list(dict.fromkeys(linear.block for linear in linears(source.model, ignore)))
        gradients = sketches(source.whole(), windows, names)
        sizes = {name: sum(p.numel() for p in block.parameters()) for name, block in blocks(source.model)}
        return {block: influence(vectors, sizes[block]) for block, vectors in gradients.items()}

    def levels(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Return scores scaled, smoothed over blocks, and turned over: the highest is at `low`."""
        from scipy.signal import savgol_filter

        scaled = super().levels(scores)
        values = torch.tensor(list(scaled.values()), dtype=torch.float64)
        if len(values) >= WINDOW:
            values = torch.from_numpy(savgol_filter(values.numpy(), WINDOW, ORDER)).clamp(0, 1)
        levels = (1 - values) * (self.high - self.low) + self.low
        return dict(zip(scaled, levels.tolist(), strict=True))


def influence(vectors: Tensor, size: int) -> float:
    """Return the sum of the positive influences of the first half of vectors on the mean of the second.

    Args:
        vectors: `[2n, d]`, gradients, or sketches that keep their dot products.
        size: entries of a gradient.
    """
    half = len(vectors) // 2
    trained, held_out = vectors[:half].double(), vectors[half:].double().mean(0)
    gram, toward = trained @ trained.T, trained @ held_out
    damping = 0.1 * (gram.diagonal().mean() / size).clamp(min=1e-30)
    influences = (half * toward - (toward / (damping + gram.diagonal())) @ gram) / (half * damping)
    return float(influences.clamp(min=0).sum())
