"""Look up the per-item scores, floors and columns that a hypothesis names.

An item is known by its suite, its number and its prompt, so that the same item counts once when several
candidates, both readouts or several budgets answer it. An item drawn several times has a single score, the
mean of its draws. Perplexity is read in nats a token, a window an item.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from stages.core.errors import Refusal
from stages.reporting.agreement import choice_entropy
from stages.reporting.collect import Results, is_noise, records
from stages.reporting.comparison import PER_ITEM
from stages.reporting.hypotheses.readout import Axis, Readout
from stages.reporting.judging import repeats_of
from stages.reporting.measured import Measured
from stages.reporting.statistics.paired import LEVEL
from stages.reporting.words import SHARES

_KEY = ["suite", "doc_id", "prompt_hash"]
_OPEN = ("task", "readout", "counted", "filter", "budget")
"""The parts of a measure that a readout may leave out."""
Floats: TypeAlias = NDArray[np.float64]


class Unknown(Refusal):
    """The tables have no such score."""


@dataclass(frozen=True)
class Term:
    """The mean score of a candidate, or its agreement with another, in one readout."""

    candidate: str
    readout: Readout
    agrees_with: str | None = None


@dataclass(frozen=True)
class ItemGrid:
    """Scores of items under several terms."""

    values: Floats
    """`[items, terms]`, NaN where an item is not part of a term, such as one of another level."""
    strata: NDArray[np.int64]
    """`[items]`: items of the same terms share a number, from 0 on."""

    def means(self) -> Floats:
        """Return the mean of each term over its items, `[terms]`."""
        return np.asarray(np.nanmean(self.values, axis=0))


class Cells:
    """The tables of a report, indexed for hypotheses.

    Args:
        noise: which candidates repeat each other, as in `report.noise`.
        measured: speed and memory.
    """

    def __init__(
        self,
        results: Results,
        noise: Mapping[str, tuple[str, ...]] | None = None,
        measured: Measured | None = None,
    ) -> None:
        self._repeats = noise or {}
        self._measured = measured or Measured()
        self._scores = dict(iter(results.scores.groupby("candidate", sort=False)))
        items = results.samples[results.samples["draw"].isna()]
        self._samples = dict(iter(items.groupby("candidate", sort=False)))
        noisy = results.scores[is_noise(results.scores)].drop_duplicates("candidate")
        self._noise = list(zip(noisy["candidate"], noisy["base"], noisy["source"], strict=True))

    def repeats(self, candidate: str) -> tuple[str, ...]:
        """Return the repeats of a candidate, itself included; empty if none are known."""
        return repeats_of(candidate, self._repeats)

    def grid(self, terms: Sequence[Term]) -> ItemGrid:
        """Return the items that all candidates of a readout answered, by term.

        Raises:
            Unknown: the tables lack a term.
            Refusal: no item was answered by all.
        """
        columns = [self._term(term) for term in terms]
        kept: dict[tuple[str, str], pd.Index] = {}
        for term, column in zip(terms, columns, strict=True):
            at = (term.readout.suite, term.readout.level)
            shared = kept.get(at, column.index).intersection(column.index, sort=False)
            if shared.empty:
                raise Refusal(f"no item of {term.readout.label()} was answered by all candidates.")
            kept[at] = shared
        frame = pd.concat(
            [
                column.loc[kept[term.readout.suite, term.readout.level]].rename(place)
                for place, (term, column) in enumerate(zip(terms, columns, strict=True))
            ],
            axis=1,
        ).sort_index()
        values = frame.to_numpy(np.float64)
        _, strata = np.unique(~np.isnan(values), axis=0, return_inverse=True)
        return ItemGrid(values, strata.reshape(-1).astype(np.int64))

    def items(self, candidate: str, readout: Readout) -> "pd.Series[float]":
        """Return a candidate's scores by item.

        Raises:
            Unknown: the tables lack them, or leave open which are meant.
            Refusal: some are not finite.
        """
        rows = self._rows(candidate, readout)
        samples = self._samples.get(candidate)
        metric = PER_ITEM.get(readout.metric, readout.metric)
        if samples is not None:
            same = samples["suite"].eq(readout.suite)
            if readout.metric == "entropy":
                same &= samples["log_likelihoods"].notna() & samples["readout"].eq("likelihood")
            else:
                same &= samples["metric"].eq(metric)
                for name in _OPEN:
                    value = rows[0][name]
                    same &= samples[name].isna() if value is None else samples[name].eq(value)
            samples = samples[
                same & (True if readout.level == "all" else samples["difficulty"] == readout.level)
            ]
        if samples is None or samples.empty:
            raise Unknown(f"{readout.label()} has no scores by item for {candidate}; choose another metric.")
        keyed = samples.drop_duplicates(_KEY).set_index(_KEY)
        entropy = readout.metric == "entropy"
        scores = keyed["log_likelihoods"].map(choice_entropy) if entropy else keyed["score"]
        scores = scores.astype("float64")
        if bad := int((~np.isfinite(scores.to_numpy())).sum()):
            raise Refusal(
                f"{bad} of {len(scores)} scores of {candidate} on {readout.label()} are not finite."
            )
        return scores

    def _term(self, term: Term) -> "pd.Series[float]":
        ours = self.items(term.candidate, term.readout)
        if term.agrees_with is None:
            return ours
        both = pd.concat([ours, self.items(term.agrees_with, term.readout)], axis=1, join="inner")
        return (both.iloc[:, 0] == both.iloc[:, 1]).astype("float64")

    def _rows(self, candidate: str, readout: Readout) -> list[dict[str, Any]]:
        """Return the score row of a readout, or any of its suite for entropy."""
        scores = self._scores.get(candidate)
        if scores is None:
            raise Unknown(f"{candidate} has no scores.")
        scores = scores[scores["suite"] == readout.suite]
        if readout.metric == "entropy":
            return records(scores.head(1))
        named = scores[scores["metric"] == readout.metric]
        if named.empty:
            listed = ", ".join(sorted(set(scores["metric"]))) or "none"
            raise Unknown(f"{readout.suite} has no metric {readout.metric!r}; allowed: {listed}.")
        for name in _OPEN:
            if (wanted := getattr(readout, name)) is not None:
                chosen = named[named[name] == wanted]
                if chosen.empty:
                    listed = ", ".join(str(value) for value in named[name].dropna().unique()) or "none"
                    raise Unknown(f"{readout.label()} has no {name} {wanted!r}; allowed: {listed}.")
                named = chosen
        level = named[named["difficulty"] == readout.level]
        if level.empty:
            listed = ", ".join(named["difficulty"].unique())
            raise Unknown(f"{readout.suite} has no level {readout.level!r}; allowed: {listed}.")
        if len(level) > 1:
            open_ = [name for name in _OPEN if level[name].nunique(dropna=False) > 1]
            listed = "; ".join(f"{name}: {', '.join(map(str, level[name].unique()))}" for name in open_)
            raise Unknown(f"{readout.label()} is not a single score; add one of {listed}.")
        return records(level)

    def base(self, candidate: str) -> str:
        """Return the dense base of a candidate.

        Raises:
            Unknown: the tables lack the candidate.
        """
        if candidate not in self._scores:
            raise Unknown(f"{candidate} has no scores.")
        return f"base/{self._scores[candidate]['base'].iloc[0]}"

    def floor(self, candidate: str, readout: Readout) -> float | None:
        """Return the floor of a readout, None where it has none or lower is better."""
        if readout.metric == "entropy":
            return None
        (row,) = self._rows(candidate, readout)
        return row["floor"] if row["higher_is_better"] else None

    def needed_floor(self, candidate: str, readout: Readout) -> float:
        """Return the floor of a readout that a share is taken above.

        Raises:
            Unknown: it has none.
        """
        floor = self.floor(candidate, readout)
        if floor is None:
            raise Unknown(f"{readout.label()} has no floor to take a share above; name zero, or read points.")
        return floor

    def column(self, candidate: str, name: str) -> float:
        """Return a number of a candidate.

        Raises:
            Unknown: the candidate has none.
        """
        value = records(self._scores[candidate].head(1))[0][name] if candidate in self._scores else None
        if value is None:
            raise Unknown(f"{candidate} has no {name}; choose another column, or give values.")
        return float(value)

    def x(self, axis: Axis, candidates: Sequence[str]) -> Floats:
        """Return the x of `candidates`, or of the levels or budgets whose `values` the axis holds.

        Raises:
            Unknown: a candidate has no such number, or its logarithm does not exist.
        """
        values = axis.values or tuple(self._x(name, axis) for name in candidates)
        x = np.asarray(values, np.float64)
        if not axis.log2:
            return x
        if (x <= 0).any():
            raise Unknown(f"x: {axis.column} is 0 for some candidates, so it has no logarithm; drop log2.")
        return np.asarray(np.log2(x))

    def _x(self, candidate: str, axis: Axis) -> float:
        if axis.batch_size is None:
            return self.column(candidate, str(axis.column))
        value = self._at(self._measured.figures, candidate, axis.batch_size)[axis.column].iloc[0]
        if value is None or np.isnan(value):
            raise Unknown(f"{axis.column} of {candidate} was not measured here; choose another column.")
        return float(value)

    def timings(self, times: Sequence[tuple[str, str, int]]) -> ItemGrid:
        """Return the logarithms of measured seconds, a stratum for each (candidate, figure, batch size).

        Repeats of two candidates are not paired, so none shares a row.

        Raises:
            Unknown: something was not measured.
        """
        columns = [
            np.log(self._at(self._measured.repeats, candidate, batch_size)[figure].to_numpy(np.float64))
            for candidate, figure, batch_size in times
        ]
        strata = np.repeat(np.arange(len(columns)), [len(column) for column in columns])
        values = np.full((len(strata), len(columns)), np.nan)
        values[np.arange(len(strata)), strata] = np.concatenate(columns)
        return ItemGrid(values, strata)

    def timing_fault(self, wanted: Sequence[tuple[str, int]]) -> str:
        """Say why measurements cannot be compared; empty if they can."""
        return self._measured.fault(wanted)

    def _at(self, rows: pd.DataFrame, candidate: str, batch_size: int) -> pd.DataFrame:
        chosen = rows[(rows["candidate"] == candidate) & (rows["batch_size"] == batch_size)]
        if chosen.empty:
            raise Unknown(f"{candidate} was not measured at batch size {batch_size}; add both to profile.")
        return chosen

    def guard(
        self,
        reference: str | None,
        candidates: Sequence[str],
        readouts: Sequence[Readout],
        *,
        interaction: bool = False,
    ) -> "Guard":
        """Compare the reference with the floor of every readout (one-sided t test at 5 %).

        Args:
            interaction: whether losses are compared between readouts. A candidate at its floor on all of them
                has lost whatever the reference had, which says nothing about the candidate.
        """
        name = reference or self.base(candidates[0])
        readouts = list(dict.fromkeys(readouts))
        known = {readout: self.floor(candidates[0], readout) for readout in readouts}
        floors = {readout: floor for readout, floor in known.items() if floor is not None}
        low = [readout.label() for readout, floor in floors.items() if not self._above(name, readout, floor)]
        blocked = f"{name} is not clearly above the floor on {', '.join(low)}" if low else ""
        if interaction and not blocked and floors:
            lost = [
                other
                for other in dict.fromkeys(candidates)
                if not any(self._above(other, readout, floor) for readout, floor in floors.items())
            ]
            if lost:
                blocked = f"{', '.join(lost)} is at the floor on every readout, so its losses say nothing"
        return Guard(name, {readout.label(): floor for readout, floor in floors.items()}, blocked)

    def _above(self, candidate: str, readout: Readout, floor: float) -> bool:
        return _clearly_above(np.asarray(self.items(candidate, readout), np.float64), floor)

    def check_lead(self, ours: str, zero: str, readouts: Sequence[Readout]) -> None:
        """Check that a candidate is better than another in every readout, by item (one-sided t test at 5 %).

        Entropy is neither better nor worse: there it must differ, to whichever side.

        Raises:
            Refusal: it is not, so there is no way between them to take a share of.
        """
        low = []
        for readout in dict.fromkeys(readouts):
            first, second = self.grid([Term(ours, readout), Term(zero, readout)]).values.T
            lead = first - second
            if readout.metric == "entropy":
                lead = lead * np.sign(lead.mean())
            elif not self._rows(ours, readout)[0]["higher_is_better"]:
                lead = -lead
            if not _clearly_above(lead, 0.0):
                low.append(readout.label())
        if low:
            raise Refusal(f"{ours} is not clearly better than {zero} on {', '.join(low)}.")

    def noise(self, candidate: str, readout: Readout) -> float | None:
        """Return how far the mean score of the candidate's base moves by numerical noise, in its unit."""
        base = self.base(candidate).removeprefix("base/")
        moves = [
            abs(float(self.items(name, readout).mean() - self.items(source, readout).mean()))
            for name, of, source in self._noise
            if of == base and source in self._scores
        ]
        return max(moves, default=None)


def _clearly_above(scores: Floats, floor: float) -> bool:
    if len(scores) < 2 or np.ptp(scores) <= 1e-9 * max(1.0, float(np.abs(scores).max())):
        return bool(scores.mean() > floor)
    return bool(stats.ttest_1samp(scores, floor, alternative="greater").pvalue <= LEVEL)


@dataclass(frozen=True)
class Guard:
    """The reference, the floors it was held against, and why nothing may be concluded, if so."""

    reference: str
    floors: dict[str, float]
    blocked: str


def unit_of(readout: Readout) -> str:
    """Return the unit of a readout's item scores."""
    known = {"perplexity": "nats a token", "entropy": "bits", "tokens": "tokens"}
    return known.get(readout.metric, "share right" if readout.metric in SHARES else readout.metric)
