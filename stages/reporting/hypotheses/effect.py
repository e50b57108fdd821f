"""Effects of scores over items, and how surely they lie beyond or within a bound.

A weighted sum of means is judged

- by McNemar's test where every item that counts, counts the same: right or wrong answers of one sum;
- by permuting items among strata (levels, suites) where the sum compares the same number between them, the
  statistic being the sum over its own standard error, so that unequal spreads do no harm (Janssen 1997,
  doi:10.1016/S0167-7152(97)00043-6);
- by a t test else, with the degrees of freedom of Satterthwaite.

Anything that is not a sum, such as a share or a score between two points of a curve, is judged by the
bootstrap. In each case items are whole: all scores of an item stay together.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from stages.core.errors import Refusal
from stages.reporting.hypotheses.cells import Floats, Guard, ItemGrid
from stages.reporting.hypotheses.evidence import Evidence, Side
from stages.reporting.statistics.bootstrap import bootstrap
from stages.reporting.statistics.luck import Luck
from stages.reporting.statistics.paired import LEVEL, POWER, discordant, mcnemar

Expect = Literal["above", "below", "within"]
_PERMUTATIONS = 9999
_TINY = 1e-12


@dataclass(frozen=True)
class Effect:
    """An effect with its interval, and the two-sided p-value that it equals a bound."""

    value: float
    low: float
    high: float
    smallest: float | None
    """See `Evidence`; None if unknown, as of a ratio whose denominator may be 0."""
    p: Callable[[float], float]


def decide(effect: Effect | Luck, expect: Expect, bound: float) -> tuple[float, Side]:
    """Return the p-value of the side of the claim that the effect lies on, and that side.

    `within` is two one-sided tests (Schuirmann 1987); beyond the bound it is the test against the nearer end.
    """
    if expect == "within":
        if abs(effect.value) < bound:
            return max(effect.p(-bound), effect.p(bound)) / 2, "supported"
        return effect.p(math.copysign(bound, effect.value)), "contradicted"
    beyond = effect.value > bound if expect == "above" else effect.value < bound
    return effect.p(bound), "supported" if beyond else "contradicted"


def weighted_sum(grid: ItemGrid, weights: Floats, *, seed: int = 0) -> Effect:
    """Return the sum over terms of `weights` `[terms]` times the mean of each.

    Raises:
        Refusal: a stratum has a single item.
    """
    member = ~np.isnan(grid.values)
    shares = np.where(member, grid.values, 0.0) * weights / member.sum(axis=0)
    parts = shares.sum(axis=1)
    value = float(parts.sum())
    strata = [parts[grid.strata == stratum] for stratum in range(grid.strata.max() + 1)]
    if min(map(len, strata)) < 2:
        raise Refusal("a level has a single item, whose spread cannot be known; score more items.")
    spreads = np.array([len(part) * part.var(ddof=1) for part in strata])
    total = float(spreads.sum())
    stderr = math.sqrt(total)
    freedom = total**2 / float((spreads**2 / [len(part) - 1 for part in strata]).sum()) if total else 1.0
    reach = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * stderr
    sizes = np.abs(parts[parts != 0])
    same = sizes.size == 0 or bool(np.ptp(sizes) <= 1e-9 * sizes.max())
    compared = _compared(member, weights, grid) if len(strata) > 1 else None

    def p(bound: float) -> float:
        if bound == 0 and compared is not None:
            return permuted(*compared, grid.strata, seed=seed).p
        if bound == 0 and same:
            return mcnemar(*discordant([0.0] * len(parts), parts.tolist()))
        if stderr == 0:  # how likely no item differs from the others if a share large enough would
            share = min(1.0, abs(value - bound) / float(np.abs(weights).max()))
            return min(1.0, 2 * (1 - share) ** len(parts))
        return float(2 * stats.t.sf(abs(value - bound) / stderr, freedom))

    # A sum of right and wrong answers: rho / n, the share of items that differ over their number.
    seen = float(np.sqrt((parts**2).sum())) if len(strata) == 1 and same else stderr
    least = (
        float(np.abs(weights).max()) * math.sqrt(3) / len(parts)
    )  # none differs: at most 3 / n do, at 95 %
    return Effect(value, value - reach, value + reach, POWER * (seen or least), p)


def _compared(member: NDArray[np.bool_], weights: Floats, grid: ItemGrid) -> tuple[Floats, Floats] | None:
    """Return per-item numbers and each stratum's factor, where the sum compares these between strata.

    None where it does not: its factors do not add up to 0, or strata weigh their terms differently.
    """
    places: list[NDArray[np.int64]] = []
    for stratum in range(grid.strata.max() + 1):
        terms = np.flatnonzero(member[grid.strata == stratum][0])
        places.append(terms)
    if len({len(terms) for terms in places}) > 1 or not len(places[0]):
        return None
    if len(np.concatenate(places)) != len(np.unique(np.concatenate(places))):
        return None  # a term spans strata
    pattern = weights[max(places, key=lambda terms: float(np.abs(weights[terms]).max()))]
    factors = [float(weights[terms] @ pattern / (pattern @ pattern)) for terms in places]
    if any(
        not np.allclose(weights[terms], factor * pattern)
        for terms, factor in zip(places, factors, strict=True)
    ):
        return None
    scale = max(map(abs, factors))
    if abs(sum(factors)) > 1e-9 * scale:
        return None
    numbers = np.empty(len(grid.values))
    for stratum, terms in enumerate(places):
        inside = grid.strata == stratum
        numbers[inside] = grid.values[inside][:, terms] @ pattern
    return numbers, np.asarray(factors)


@dataclass(frozen=True)
class Permuted:
    """A sum over strata, its standard error, and the two-sided p-value that strata do not matter."""

    value: float
    stderr: float
    p: float


def permuted(
    numbers: Floats, factors: Floats, strata: NDArray[np.int64], whole: Floats | None = None, *, seed: int = 0
) -> Permuted:
    """Judge sum_s factors_s mean_s(numbers), or of mean(numbers) / mean(whole), by permuting items.

    Args:
        numbers: `[items]`.
        factors: `[strata]`, which add up to 0.
        whole: `[items]`, what a share is taken of; it moves with its item.
    """
    groups = [np.flatnonzero(strata == stratum) for stratum in range(len(factors))]

    def moments(*places: NDArray[np.int64]) -> tuple[Floats, Floats]:
        value = variance = np.zeros(())
        for factor, place in zip(factors, places, strict=True):
            ours, count = numbers[place], place.shape[-1]
            mean = ours.mean(axis=-1)
            left = ours - mean[..., None]
            if whole is not None:
                of = whole[place].mean(axis=-1)
                of = np.where(np.abs(of) < _TINY, _TINY, of)
                mean = mean / of
                left = (ours - mean[..., None] * whole[place]) / of[..., None]
            value = value + factor * mean
            variance = variance + factor**2 * (left**2).sum(axis=-1) / (count - 1) / count
        return value, variance

    def studentized(*places: NDArray[np.int64], axis: int = -1) -> Floats:
        value, variance = moments(*(np.moveaxis(np.asarray(place), axis, -1) for place in places))
        return np.asarray(value / np.sqrt(np.maximum(variance, _TINY)))

    test = stats.permutation_test(
        tuple(groups), studentized, permutation_type="independent", n_resamples=_PERMUTATIONS,
        alternative="two-sided", vectorized=True, batch=500, rng=np.random.default_rng(seed),
    )  # fmt: skip
    value, variance = moments(*groups)
    return Permuted(float(value), math.sqrt(float(variance)), float(test.pvalue))


def drawn(grid: ItemGrid, statistic: Callable[[Floats], Floats], *, seed: int = 0) -> Effect:
    """Return a statistic of the terms' means `[..., terms]`, with items drawn again.

    Raises:
        Refusal: a stratum has a single item.
    """
    member = ~np.isnan(grid.values)
    kinds = range(grid.strata.max() + 1)
    counts = np.array([member[grid.strata == kind].sum(axis=0) for kind in kinds], np.float64)
    parts = counts / counts.sum(axis=0)  # of each term's items, the share in each stratum
    filled = np.where(member, grid.values, 0.0)

    def of_means(means: Floats) -> Floats:
        return statistic((means * parts).sum(axis=-2))

    estimate = bootstrap(filled, of_means, grid.strata, seed=seed)

    def p(bound: float) -> float:
        shifted = bootstrap(filled, lambda means: of_means(means) - bound, grid.strata, seed=seed)
        return shifted.p

    smallest = POWER * estimate.stderr if math.isfinite(estimate.stderr) else None
    return Effect(estimate.value, estimate.low, estimate.high, smallest, p)


def read_between(x: Floats, y: Floats, at: Floats) -> Floats:
    """Read `y` at `at` `[...]` on straight lines between points `(x, y)`, both `[..., points]`, unsorted."""
    order = np.argsort(x, axis=-1)
    x, y = np.take_along_axis(x, order, -1), np.take_along_axis(y, order, -1)
    left = np.clip((x <= at[..., None]).sum(axis=-1) - 1, 0, x.shape[-1] - 2)[..., None]
    (x0, x1), (y0, y1) = (
        [np.take_along_axis(side, left + step, -1)[..., 0] for step in (0, 1)] for side in (x, y)
    )
    width = x1 - x0
    part = np.where(width > _TINY, (at - x0) / np.where(width > _TINY, width, 1.0), 0.5)
    return np.asarray(y0 + part * (y1 - y0))


def evidence_of(
    effect: Effect,
    expect: Expect,
    bound: float,
    *,
    unit: str,
    n: int,
    guard: Guard,
    noise: float | None = None,
    repeats: Luck | None = None,
) -> Evidence:
    """Return the finding of an effect against a bound.

    It is blocked if the effect is within numerical noise of its bound, or over repeats not surely on its side
    of it.
    """
    p, side = decide(effect, expect, bound)
    blocked = guard.blocked
    distance = abs(effect.value - bound)
    if not blocked and expect != "within" and noise is not None and distance <= noise:
        blocked = f"the effect is {distance:.3g} from its bound, within numerical noise ({noise:.3g})"
    if not blocked and repeats is not None:
        luck, turned = decide(repeats, expect, bound)
        if luck > LEVEL or turned != side:
            blocked = (
                f"over the repeats of its recipes the effect is {repeats.value:.3g} \N{PLUS-MINUS SIGN} "
                f"{repeats.noise:.3g}, so other draws may turn it"
            )
    claimed = {"above": (bound, None), "below": (None, bound), "within": (-bound, bound)}[expect]
    return Evidence(
        effect=effect.value, low=effect.low, high=effect.high, unit=unit, p=p, claimed=claimed, side=side,
        n=n, smallest=effect.smallest, floors=guard.floors, noise=noise, repeats=repeats, blocked=blocked,
    )  # fmt: skip
