"""Contrast: a weighted sum of mean scores, such as a difference, or a difference of differences.

The sum runs over sides (candidates, each with a weight) and readouts (suites, metrics and levels, each with
a weight), and multiplies the weights: sides of 1 and -1 with readouts of 1 (hard) and -1 (easy) give how much
more a candidate loses on hard items than on easy ones. Read as

- `difference`: the scores as they are; nats a token for perplexity.
- `retention`: each score as the share (score - zero) / (reference - zero) of what the reference has above
  zero, which is the measured floor, or the score of the candidate `zero`: with the pruned model as zero, the
  share is the recovered fraction.

A side may be a curve: several candidates, or several budgets of one, read at a common x by straight lines
between neighbours. x is a size, which is known, or a perplexity or a number of tokens, which is measured;
items of both are drawn again together, so that its error is part of the interval.

With unit `repeat` the scores are times that `profile` measured, `timings` in place of readouts, and repeats
are the units. Times are read as logarithms, so a difference is the logarithm of a ratio: 0.05 is 5 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeAlias

from pydantic import AfterValidator, Field, model_validator

from stages.core.lazy import np
from stages.core.schema import Candidate, Slug, Strict
from stages.reporting.hypotheses.readout import Readout
from stages.reporting.hypotheses.tested import Tested

if TYPE_CHECKING:
    from stages.reporting.hypotheses.cells import Cells, Floats, Term
    from stages.reporting.hypotheses.evidence import Evidence

_Read: TypeAlias = "Callable[[Floats], Floats]"
"""From the means of terms `[..., terms]` to a value `[...]`."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
_WITHOUT_FLOOR = ("perplexity", "entropy", "kl", "tokens", "ended", "repetition", "self_bleu")


def _counts(weight: float) -> float:
    if not weight:
        raise ValueError("a weight of 0 leaves it out of the sum; remove the entry, or give it a weight")
    return weight


Weight = Annotated[Finite, AfterValidator(_counts)]
"""A factor of the sum, such as 1 and -1 for a difference."""


class Weighed(Strict):
    """One candidate, or a curve of several that is read at the contrast's `at`, and its weight."""

    weight: Weight
    candidate: Candidate | None = None
    curve: Annotated[tuple[Candidate, ...], Field(min_length=2)] | None = None
    budgets: Annotated[tuple[int, ...], Field(min_length=2)] | None = None
    """The budgets of `candidate` as a curve."""
    agrees_with: Candidate | None = None
    """Read, in place of the score, whether `candidate` scores an item as this one does (1) or not (0)."""

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        if (self.candidate is None) == (self.curve is None):
            raise ValueError("give either candidate or curve")
        if self.curve and (self.budgets or self.agrees_with):
            raise ValueError("budgets and agrees_with need candidate in place of curve")
        if self.budgets and self.agrees_with:
            raise ValueError("give either budgets or agrees_with")
        return self

    @property
    def is_curve(self) -> bool:
        """Tell whether it is read between points."""
        return self.curve is not None or self.budgets is not None

    def names(self) -> list[str]:
        """Return the candidates it reads."""
        return [
            *([self.candidate] if self.candidate else self.curve or ()),
            *filter(None, [self.agrees_with]),
        ]


class WeighedReadout(Readout):
    """A measure and its weight, such as 1 for hard and -1 for easy items."""

    weight: Weight = 1.0


class Timing(Strict):
    """A time that `profile` measured at a batch size, and its weight."""

    figure: Literal["seconds_to_first_token", "seconds_per_token"]
    batch_size: Annotated[int, Field(ge=1)]
    weight: Weight = 1.0


class Match(Strict):
    """The x at which curves are read."""

    by: Literal["perplexity", "tokens", "bytes_ideal", "bytes_on_disk", "bits_per_weight"]
    suite: Slug | None = None
    """The text of `perplexity`; the other kinds need none."""
    value: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    candidate: Candidate | None = None
    """The candidate whose own x is taken, in place of `value`."""

    @model_validator(mode="after")
    def _given_once(self) -> Self:
        if (self.value is None) == (self.candidate is None):
            raise ValueError("give either value or candidate")
        if (self.suite is None) == (self.by == "perplexity"):
            raise ValueError("perplexity needs suite, the other kinds must not have one")
        return self


class ContrastTest(Tested):
    """A weighted sum of scores against a bound."""

    test: Literal["contrast"]
    sides: Annotated[tuple[Weighed, ...], Field(min_length=1)]
    unit: Literal["item", "repeat"] = "item"
    """`repeat` compares times, and needs `timings` in place of `readouts`."""
    readouts: tuple[WeighedReadout, ...] = ()
    timings: tuple[Timing, ...] = ()
    measure: Literal["difference", "retention"] = "difference"
    zero: Candidate | None = None
    """The candidate whose score is 0 % of `retention`; null: the measured floor."""
    at: Match | None = None
    expect: Literal["above", "below", "within"]
    bound: Finite = 0.0
    """The claim: the sum is above it, below it, or within it on either side."""

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if any(side.is_curve for side in self.sides) != (self.at is not None):
            raise ValueError("at goes with a curve or budgets among sides")
        if self.expect == "within" and self.bound <= 0:
            raise ValueError("within needs a bound above 0")
        if self.zero is not None and self.measure != "retention":
            raise ValueError("zero goes with measure retention")
        return self

    @model_validator(mode="after")
    def _of_one_unit(self) -> Self:
        if self.unit == "item" and (self.timings or not self.readouts):
            raise ValueError("unit item needs readouts and no timings")
        if self.unit == "repeat":
            if self.readouts or not self.timings:
                raise ValueError("unit repeat needs timings and no readouts")
            if self.measure != "difference" or self.reference or any(side.agrees_with for side in self.sides):
                raise ValueError("unit repeat has no retention, reference or agrees_with; leave them out")
            if any(side.is_curve for side in self.sides):
                raise ValueError("unit repeat reads no curves; name a candidate on each side")
        return self

    def mistakes(self) -> Iterator[str]:
        for place, side in enumerate(self.sides):
            for points in filter(None, (side.curve, side.budgets)):
                if len(set(points)) < len(points):
                    yield f"sides.{place}: the curve names a point twice; name each once."
        same = [side.model_dump_json(exclude={"weight"}) for side in self.sides]
        if len(set(same)) < len(same):
            yield "sides: two are the same; give one of them their weights' sum."
        readouts = [
            reading.model_dump_json(exclude={"weight"}) for reading in (*self.readouts, *self.timings)
        ]
        if len(set(readouts)) < len(readouts):
            yield "readouts, timings: two are the same; give one of them their weights' sum."
        if self.measure == "retention" and self.zero is None:
            for metric in dict.fromkeys(r.metric for r in self.readouts if r.metric in _WITHOUT_FLOOR):
                yield f"measure: {metric} has no floor to take a share above; name zero, or drop measure."

    def measured(self) -> Sequence[tuple[str, int]]:
        return [(str(side.candidate), timing.batch_size) for side in self.sides for timing in self.timings]

    def candidates_read(self) -> Sequence[str]:
        if self.unit == "repeat":
            return []
        names = [name for side in self.sides for name in side.names()]
        extra = [self.zero, self.at.candidate if self.at else None]
        return [*names, *(name for name in extra if name)]

    def readouts_read(self) -> Sequence[Readout]:
        wanted: list[Readout] = []
        if not all(side.budgets for side in self.sides):
            wanted += self.readouts
        for side in self.sides:
            wanted += [
                readout.model_copy(update={"budget": budget})
                for budget in side.budgets or ()
                for readout in self.readouts
            ]
        if self.at and self.at.by == "tokens":
            wanted += [
                _plain(readout, metric="tokens", counted=None, filter=None) for readout in list(wanted)
            ]
        if self.at and self.at.suite:
            wanted.append(Readout(suite=self.at.suite, metric="perplexity"))
        return wanted

    def judge(self, cells: Cells) -> Evidence:
        return self._of_repeats(cells) if self.unit == "repeat" else self._of_items(cells)

    def _of_repeats(self, cells: Cells) -> Evidence:
        from stages.reporting.hypotheses.cells import Guard
        from stages.reporting.hypotheses.effect import evidence_of, weighted_sum

        weights: dict[tuple[str, str, int], float] = {}
        for side in self.sides:
            for timing in self.timings:
                time = (str(side.candidate), timing.figure, timing.batch_size)
                weights[time] = weights.get(time, 0.0) + side.weight * timing.weight
        grid = cells.timings(list(weights))
        finding = evidence_of(
            weighted_sum(grid, np.array(list(weights.values()))),
            self.expect,
            self.bound,
            unit="log of a ratio of times",
            n=len(grid.values),
            guard=Guard("", {}, cells.timing_fault(self.measured())),
        )
        return replace(finding, units="repeats")

    def _of_items(self, cells: Cells) -> Evidence:
        from stages.reporting.hypotheses.cells import unit_of
        from stages.reporting.hypotheses.effect import drawn, evidence_of, weighted_sum
        from stages.reporting.hypotheses.repeats import over_repeats

        names = [name for side in self.sides for name in side.names()]
        between = [readout.weight for readout in self.readouts]
        guard = cells.guard(
            self.reference,
            names,
            self._guarded(),
            interaction=self.measure == "difference" and min(between) < 0 < max(between),
        )
        if self.zero is not None:
            cells.check_lead(guard.reference, self.zero, self._guarded())
        pairs = [(side, readout) for side in self.sides for readout in self.readouts]
        weights = [side.weight * readout.weight for side, readout in pairs]
        if self.measure == "difference" and self.at is None:
            terms = [_points(side, readout)[0] for side, readout in pairs]
            grid = cells.grid(terms)
            factors = np.array(weights)
            return evidence_of(
                weighted_sum(grid, factors),
                self.expect,
                self.bound,
                unit=unit_of(self.readouts[0]),
                n=len(grid.values),
                guard=guard,
                noise=self._noise(cells, names[0]),
                repeats=over_repeats(cells, terms, grid.means(), lambda means: np.asarray(means @ factors)),
            )
        sheet = _Sheet(cells, self.at)
        reads = [self._read(sheet, side, readout, guard.reference) for side, readout in pairs]
        grid = cells.grid(sheet.terms)

        def total(means: Floats) -> Floats:
            return np.asarray(sum(w * read(means) for w, read in zip(weights, reads, strict=True)))

        unit = "share of the reference" if self.measure == "retention" else unit_of(self.readouts[0])
        finding = evidence_of(
            drawn(grid, total),
            self.expect,
            self.bound,
            unit=unit,
            n=len(grid.values),
            guard=guard,
            repeats=over_repeats(cells, sheet.terms, grid.means(), total),
        )
        return replace(finding, blocked=finding.blocked or sheet.outside(grid.means()))

    def _guarded(self) -> list[Readout]:
        """Return the readouts, at the largest budget that is read."""
        budgets = [budget for side in self.sides for budget in side.budgets or ()]
        update = {"budget": max(budgets)} if budgets else {}
        return [_plain(readout, **update) for readout in self.readouts]

    def _noise(self, cells: Cells, candidate: str) -> float | None:
        """Return how far the sum moves if every readout of its heaviest side moves by its noise."""
        if any(side.agrees_with for side in self.sides):
            return None
        moves = [cells.noise(candidate, _plain(readout)) for readout in self.readouts]
        known = [move for move in moves if move is not None]
        if len(known) < len(moves):
            return None
        heaviest = max(abs(side.weight) for side in self.sides)
        return heaviest * sum(
            abs(readout.weight) * move for readout, move in zip(self.readouts, known, strict=True)
        )

    def _read(self, sheet: _Sheet, side: Weighed, readout: WeighedReadout, reference: str) -> _Read:
        """Return the value of a side in a readout as a function of the terms' means."""
        from stages.reporting.hypotheses.cells import Term

        value = sheet.read(_points(side, readout), curve=side.is_curve)
        if self.measure == "difference":
            return value
        plain = _plain(readout, **({"budget": max(side.budgets)} if side.budgets else {}))
        whole = sheet.read([Term(reference, plain)])
        if self.zero is not None:
            zero = sheet.read([Term(self.zero, plain)])
        else:
            zero = _constant(sheet.cells.needed_floor(reference, plain))

        def share(means: Floats) -> Floats:
            with np.errstate(divide="ignore", invalid="ignore"):  # drawn again, there may be nothing to keep
                return np.asarray((value(means) - zero(means)) / (whole(means) - zero(means)))

        return share


def _constant(value: float) -> _Read:
    return lambda means: np.full(means.shape[:-1], value)


def _plain(readout: Readout, **update: object) -> Readout:
    """Return a readout without its weight."""
    return Readout(**readout.model_dump(exclude={"weight"}) | update)


def _points(side: Weighed, readout: Readout) -> list[Term]:
    """Return the terms of a side in a readout: one, or those of a curve."""
    from stages.reporting.hypotheses.cells import Term

    if side.budgets:
        return [Term(str(side.candidate), _plain(readout, budget=budget)) for budget in side.budgets]
    if side.curve:
        return [Term(candidate, _plain(readout)) for candidate in side.curve]
    return [Term(str(side.candidate), _plain(readout), side.agrees_with)]


@dataclass
class _Sheet:
    """The terms in use, each once, and the x at which curves are read."""

    cells: Cells
    at: Match | None
    terms: list[Term] = field(default_factory=list)
    curves: list[tuple[list[_Read], _Read]] = field(default_factory=list)

    def read(self, points: list[Term], *, curve: bool = False) -> _Read:
        """Return the mean of a single point, or a curve's at the common x, from the means of all terms."""
        from stages.reporting.hypotheses.effect import read_between

        ys = [self._mean(point) for point in points]
        if not curve or self.at is None:
            return ys[0]
        xs = [self._x(point.candidate, point.readout) for point in points]
        at = self._target(points[0].readout)
        self.curves.append((xs, at))

        def value(means: Floats) -> Floats:
            x, y = (np.stack([one(means) for one in side], axis=-1) for side in (xs, ys))
            return read_between(x, y, at(means))

        return value

    def outside(self, means: Floats) -> str:
        """Say that a curve does not reach the x at which it is read; empty if all do."""
        for xs, at in self.curves:
            x, target = [float(one(means)) for one in xs], float(at(means))
            if not min(x) <= target <= max(x):
                ends = " to ".join(f"{np.exp(end):.4g}" for end in (min(x), max(x)))
                by = self.at.by if self.at else ""
                return f"{by} {np.exp(target):.4g} lies outside the curve, which goes from {ends}"
        return ""

    def _mean(self, term: Term) -> _Read:
        if term not in self.terms:
            self.terms.append(term)
        place = self.terms.index(term)
        return lambda means: means[..., place]

    def _x(self, candidate: str, readout: Readout) -> _Read:
        """Return the logarithm of a candidate's size, perplexity or tokens."""
        from stages.reporting.hypotheses.cells import Term

        assert self.at is not None
        if self.at.by == "perplexity":
            return self._mean(Term(candidate, Readout(suite=str(self.at.suite), metric="perplexity")))
        if self.at.by == "tokens":
            spent = readout.model_copy(update={"metric": "tokens", "counted": None, "filter": None})
            tokens = self._mean(Term(candidate, spent))
            return lambda means: np.log(tokens(means))
        return _constant(np.log(self.cells.column(candidate, self.at.by)))

    def _target(self, readout: Readout) -> _Read:
        assert self.at is not None
        if self.at.candidate is not None:
            return self._x(self.at.candidate, readout)
        return _constant(np.log(float(self.at.value or 0)))
