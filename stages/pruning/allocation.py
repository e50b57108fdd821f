"""How a share of zeros is spread over a model: some blocks bear more than others.

An allocation gives each linear a share such that their mean, weighted by parameters, is the target. Under
`Uniform`, the papers' default, all have the target. Those measured on the model score its blocks first; a
linear has its block's share, except under ERK, which looks at the shape of every matrix by itself.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from math import floor, isfinite, nan
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.compress.select import wanda_scores
from stages.compress.statistics import ColumnNorm, Statistic
from stages.compress.walk import walk
from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.numbers import finite
from stages.core.schema import Strict
from stages.model.blocks import Linear, blocks, linears

if TYPE_CHECKING:
    from torch import Tensor

    from stages.model.stream import Empty

log = logging.getLogger(__name__)


class _Allocation(Strict):
    reads_text: ClassVar[bool] = False

    def shares(
        self,
        source: Empty,
        ignore: tuple[str, ...],
        sparsity: float,
        windows: Tensor | None,
        batch_size: int | None = None,
    ) -> dict[str, float]:
        """The share of zeros of each linear that is not ignored, by full name, in [0, 1].

        Args:
            windows: `[num_samples, sequence_length]` token ids, where it reads text; two or more.
            batch_size: windows a block takes at a time where it is walked; None as in `stages.compress.walk`.
        """
        raise NotImplementedError


class Uniform(_Allocation):
    """The same share everywhere."""

    kind: Literal["uniform"]
    floor_rows: bool = False
    """Where weights are compared within rows: floor(columns * sparsity) of every row go, as in the authors'
    code of Wanda. Where this does not divide, the whole then loses less than the target."""


class ERK(_Allocation):
    """Erdos-Renyi (1911.11134): a matrix keeps a share like (rows + columns) / (rows * columns)."""

    kind: Literal["erk"]

    def shares(
        self,
        source: Empty,
        ignore: tuple[str, ...],
        sparsity: float,
        windows: Tensor | None,
        batch_size: int | None = None,
    ) -> dict[str, float]:
        """Matrices that would keep more than everything keep everything, the others less for it."""
        found = linears(source.model, ignore)
        sizes = {one.name: one.weight.numel() for one in found}
        raw = {one.name: sum(one.weight.shape) / one.weight.numel() for one in found}
        dense: set[str] = set()
        while True:
            rest = [name for name in raw if name not in dense]
            kept = (1 - sparsity) * sum(sizes.values()) - sum(sizes[name] for name in dense)
            factor = kept / sum(raw[name] * sizes[name] for name in rest)
            over = {name for name in rest if factor * raw[name] > 1}
            if not over:
                return {name: 0.0 if name in dense else 1 - factor * raw[name] for name in raw}
            dense |= over


class OWL(_Allocation):
    """Outlier-weighed (2310.05175): blocks with many outliers among |W| * norm of the input lose less.

    A block's score is the share of its entries above `multiple` times their mean, over all its linears.
    Scores are scaled to [0, 2 * spread]; the kept share is that, centred on 1 - sparsity.
    """

    reads_text: ClassVar[bool] = True
    kind: Literal["owl"]
    multiple: Annotated[float, Field(gt=0)] = 5.0
    spread: Annotated[float, Field(gt=0, lt=0.5)] = 0.08
    """The paper's lambda: no block is further than twice this from another."""

    def shares(
        self,
        source: Empty,
        ignore: tuple[str, ...],
        sparsity: float,
        windows: Tensor | None,
        batch_size: int | None = None,
    ) -> dict[str, float]:
        """One forward through the dense model."""
        found = linears(source.model, ignore)
        scores: dict[str, float] = {}
        held: dict[str, list[Tensor]] = defaultdict(list)

        def look(linear: Linear, norms: Statistic | None) -> None:
            assert isinstance(norms, ColumnNorm)
            held[linear.block].append(wanda_scores(linear.weight, norms.norm())(slice(None)).flatten())
            if len(held[linear.block]) == sum(one.block == linear.block for one in found):
                every = torch.cat(held.pop(linear.block))
                mean = every.mean()
                share = (every > self.multiple * mean).double().mean()
                scores[linear.block] = float(share) if mean.isfinite() else nan

        source.bring_rest()
        walk(
            source.model, look, windows=windows, statistic=ColumnNorm, sequential="none", ignore=ignore,
            batch_size=batch_size, label="owl", home=source,
        )  # fmt: skip
        offsets = scaled(self.kind, scores, 0, -2 * self.spread)
        return solved(
            lambda shift: {b: offset + shift for b, offset in offsets.items()},
            found,
            sparsity,
            "a smaller spread",
        )


class Alpha(_Allocation):
    """AlphaPruning (2410.10912): blocks with heavy-tailed spectra are better trained and lose less.

    A block's score is the exponent of a power law through the upper half of the eigenvalues of W WT (Hill's
    estimator), averaged over its linears; mapped linearly to [1 - spread, 1 + spread] and rescaled.
    """

    kind: Literal["alpha"]
    spread: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """The paper's epsilon."""

    def shares(
        self,
        source: Empty,
        ignore: tuple[str, ...],
        sparsity: float,
        windows: Tensor | None,
        batch_size: int | None = None,
    ) -> dict[str, float]:
        """The singular values of every weight."""
        found = linears(source.model, ignore)
        exponents: dict[str, list[float]] = defaultdict(list)
        for name, block in blocks(source.model):
            with source.block(name, block):
                for one in (one for one in found if one.block == name):
                    if len(values := spectrum(one.weight)) > 1:
                        exponents[name].append(hill(values))
                    else:
                        log.warning("allocation alpha: %s has rank %d, no exponent", one.name, len(values))
        if none := sorted({one.block for one in found} - exponents.keys()):
            raise Refusal(
                f"allocation alpha: no matrix of {', '.join(none[:8])} has two singular values beside zero, "
                "so there is nothing to fit; take kind erk or uniform, or list these matrices in ignore."
            )
        mean = {block: sum(values) / len(values) for block, values in exponents.items()}
        factor = scaled(self.kind, mean, 1 - self.spread, 1 + self.spread)
        return solved(
            lambda scale: {b: f * scale for b, f in factor.items()}, found, sparsity, "a smaller spread"
        )


class LayerIF(_Allocation):
    """LayerIF (2505.23811): blocks through which training text helps held-out text most lose least.

    Influence is DataInf's closed form (2310.00902): with g_i the gradients of the first half of the windows
    and v the mean gradient of the second half, both of one block, window k has the influence
    sum_i (v.g_k - (v.g_i)(g_i.g_k) / (damping + |g_i|^2)) / (n * damping), with a tenth of the gradients'
    mean square entry as damping. Positive influences are summed, scaled to [0, 1] over blocks and smoothed
    (Savitzky-Golay, window 5, order 2; not where there are fewer than five blocks).
    """

    reads_text: ClassVar[bool] = True
    kind: Literal["layer-if"]
    low: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """The share of the most influential block, before all are rescaled to the target."""
    high: Annotated[float, Field(gt=0, lt=1)] = 0.40
    """That of the least influential one."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low must be below high; {self.low:g} and {self.high:g} given")
        return self

    def shares(
        self,
        source: Empty,
        ignore: tuple[str, ...],
        sparsity: float,
        windows: Tensor | None,
        batch_size: int | None = None,
    ) -> dict[str, float]:
        """One forward and backward a window, the whole model in memory."""
        from scipy.signal import savgol_filter

        from stages.pruning.gradients import sketches

        assert windows is not None
        found = linears(source.model, ignore)
        each = sketches(source.whole(), windows, sorted({one.block for one in found}))
        sizes = {name: sum(p.numel() for p in block.parameters()) for name, block in blocks(source.model)}
        scores = {block: influence(vectors, sizes[block]) for block, vectors in each.items()}
        order = sorted(scores, key=lambda block: int(block.rpartition(".")[2]))
        scores = scaled(self.kind, scores, 0, 1)
        values = torch.tensor([scores[block] for block in order], dtype=torch.float64)
        if len(values) >= 5:
            values = torch.from_numpy(savgol_filter(values.numpy(), 5, 2)).clamp(0, 1)
        raw = (1 - values) * (self.high - self.low) + self.low
        factor = dict(zip(order, raw.tolist(), strict=True))
        return solved(
            lambda scale: {b: f * scale for b, f in factor.items()}, found, sparsity, "a larger low"
        )


Allocation = Annotated[Uniform | ERK | OWL | Alpha | LayerIF, Field(discriminator="kind")]


def scaled(kind: str, scores: dict[str, float], low: float, high: float) -> dict[str, float]:
    """`scores` of blocks mapped linearly, the least to `low` and the largest to `high`; all alike to `low`.

    Raises:
        Refusal: a score is not a finite number.
    """
    if broken := [block for block, score in scores.items() if not isfinite(score)]:
        raise Refusal(
            f"allocation {kind} finds no finite score for {', '.join(broken[:8])}; look for NaN or huge "
            "values in their weights, or take kind erk or uniform."
        )
    least = min(scores.values())
    if len(scores) > 1 and max(scores.values()) == least:
        log.warning(
            "allocation %s: the score of all %d blocks is %g, so all lose the same share, as under uniform",
            kind, len(scores), least,
        )  # fmt: skip
    width = (max(scores.values()) - least) or 1.0
    return {block: low + (high - low) * ((score - least) / width) for block, score in scores.items()}


def spectrum(weight: Tensor) -> Tensor:
    """The eigenvalues of W WT that fp32 can tell from zero, of `weight` `[out, in]`: `[rank]` fp64.

    NaN where a weight is not finite.
    """
    if not finite(weight):
        return torch.full((2,), nan, dtype=torch.float64)
    values = torch.linalg.svdvals(weight.float()).double()
    least = torch.finfo(torch.float32).eps * max(weight.shape) ** 0.5 * values.amax()
    return values[values > least] ** 2


def hill(eigenvalues: Tensor) -> float:
    """The exponent of a power law through the upper half of `eigenvalues` `[n]`: 1 + k / sum ln(l_i / l_k).

    Huge where the upper half is all alike, NaN where a value is not finite.
    """
    if not finite(eigenvalues):
        return nan
    ordered = eigenvalues.double().sort().values
    k = max(1, len(ordered) // 2)
    threshold = ordered[-k - 1] if len(ordered) > k else ordered[0]
    logs = (ordered[-k:] / threshold.clamp(min=1e-30)).log().sum()
    return 1 + k / max(float(logs), 1e-12)


def influence(vectors: Tensor, size: int) -> float:
    """Sum of the positive influences of the first half of `vectors` `[2n, d]` on the mean of the second.

    Args:
        vectors: gradients, or sketches that keep their dot products.
        size: entries of a gradient.
    """
    half = len(vectors) // 2
    ours, held = vectors[:half].double(), vectors[half:].double().mean(0)
    gram, toward = ours @ ours.T, ours @ held
    damping = 0.1 * (gram.diagonal().mean() / size).clamp(min=1e-30)
    each = (half * toward - (toward / (damping + gram.diagonal())) @ gram) / (half * damping)
    return float(each.clamp(min=0).sum())


def solved(
    of: Callable[[float], dict[str, float]], found: list[Linear], sparsity: float, change: str
) -> dict[str, float]:
    """Each linear's share from shares of blocks that grow with one number, which is set by bisection.

    Args:
        of: the number -> share of every block, before it is clamped to [0, 1].
        found: the linears; their mean share by parameters is `sparsity`.
        change: what to take where that cannot be, as some blocks would not even then lose enough.

    Raises:
        Refusal: it cannot be.
    """
    sizes: Counter[str] = Counter()
    for one in found:
        sizes[one.block] += one.weight.numel()

    def clamped(number: float) -> dict[str, float]:
        return {block: min(max(share, 0.0), 1.0) for block, share in of(number).items()}

    def reached(number: float) -> float:
        shares = clamped(number)
        return sum(shares[block] * size for block, size in sizes.items()) / sizes.total()

    low, high = -1e3, 1e3
    if (most := reached(high)) < sparsity - 1 / sizes.total():
        raise Refusal(
            f"sparsity {sparsity:g} cannot be reached under this allocation, whose blocks lose "
            f"{floor(most * 1e4) / 1e4:g} at most together; take {change} or a lower sparsity."
        )
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) < sparsity else (low, middle)
    shares = clamped(high)
    return {one.name: shares[one.block] for one in found}
