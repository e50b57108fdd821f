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
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.core.schema import Candidate, Slug, Strict
from stages.reporting.hypotheses.readout import Readout
from stages.reporting.hypotheses.tested import Tested

if TYPE_CHECKING:
    from stages.reporting.hypotheses.cells import Cells
    from stages.reporting.hypotheses.finding import Finding

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Weighed(Strict):
    """One candidate, or a curve of several that is read at the contrast's `at`, and its weight."""

    weight: Finite
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

    weight: Finite = 1.0


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
    readouts: Annotated[tuple[WeighedReadout, ...], Field(min_length=1)]
    measure: Literal["difference", "retention"] = "difference"
    zero: Candidate | None = None
    """The candidate whose score is 0 % of `retention`; null: the measured floor."""
    at: Match | None = None
    expect: Literal["above", "below", "within"]
    bound: Finite = 0.0
    """The claim is a sum above it, below it, or within it on either side. Above -0.02: at most 2 points worse."""

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if any(side.is_curve for side in self.sides) != (self.at is not None):
            raise ValueError("at goes with a curve or budgets among sides")
        if self.expect == "within" and self.bound <= 0:
            raise ValueError("within needs a bound above 0")
        if self.zero is not None and self.measure != "retention":
            raise ValueError("zero goes with measure retention")
        return self

    def candidates_read(self) -> Sequence[str]:
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
        if self.at and self.at.suite:
            wanted.append(Readout(suite=self.at.suite, metric="perplexity"))
        return wanted

    def judge(self, cells: Cells) -> Finding:
        raise NotImplementedError
