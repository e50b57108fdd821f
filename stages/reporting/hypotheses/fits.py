"""Fit: which of two numbers explains the scores of candidates better, across bases.

Each candidate's score is predicted by a straight line (or a parabola) through all others, once over each
number. The effect is how much smaller the squared errors of the first are; candidates are the units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stages.core.errors import Refusal
from stages.core.lazy import np
from stages.core.schema import Candidate
from stages.reporting.hypotheses.readout import Axis, Readout
from stages.reporting.hypotheses.tested import Tested

if TYPE_CHECKING:
    from stages.reporting.hypotheses.cells import Cells, Floats
    from stages.reporting.hypotheses.evidence import Evidence


_ALIKE = 1e-12


class FitTest(Tested):
    """The number `better` explains scores better than `worse` does."""

    test: Literal["fit"]
    readout: Readout
    candidates: Annotated[tuple[Candidate, ...], Field(min_length=8)]
    better: Axis
    worse: Axis
    degree: Annotated[int, Field(ge=1, le=2)] = 1
    """1: a straight line; 2: a parabola."""
    share: bool = False
    """Read each score as the share of its own dense base's above the floor."""

    def mistakes(self) -> Iterator[str]:
        if len(set(self.candidates)) < len(self.candidates):
            yield "candidates: one is listed twice; list it once."
        for name, axis in (("better", self.better), ("worse", self.worse)):
            if axis.values is not None and len(axis.values) != len(self.candidates):
                count = len(self.candidates)
                yield f"{name}.values: {len(axis.values)} given for {count} candidates; give one for each."

    def candidates_read(self) -> Sequence[str]:
        return self.candidates

    def readouts_read(self) -> Sequence[Readout]:
        return [self.readout]

    def measured(self) -> Sequence[tuple[str, int]]:
        return [pair for axis in (self.better, self.worse) for pair in axis.measured(self.candidates)]

    def judge(self, cells: Cells) -> Evidence:
        from scipy import stats

        from stages.reporting.hypotheses.evidence import Evidence
        from stages.reporting.statistics.paired import POWER, Z

        bases = dict.fromkeys([self.reference] if self.reference else map(cells.base, self.candidates))
        guards = [cells.guard(base, self.candidates, [self.readout]) for base in bases]
        blocked = next((guard.blocked for guard in guards if guard.blocked), "")
        y = np.array([self._score(cells, candidate) for candidate in self.candidates])
        if np.ptp(y) < _ALIKE:
            raise Refusal(f"all candidates score the same on {self.readout.label()}, so nothing explains it.")
        axes = (self.better, self.worse)
        ours, others = (_left_out(cells.x(axis, self.candidates), y, self.degree) ** 2 for axis in axes)
        gains = others - ours
        test = stats.permutation_test(
            (gains,), lambda values, axis: values.mean(axis=axis), permutation_type="samples",
            n_resamples=9999, vectorized=True, rng=np.random.default_rng(0),
        )  # fmt: skip
        whole = float(others.mean())
        effect, spread = float(gains.mean()), float(gains.std(ddof=1) / np.sqrt(len(gains)))
        return Evidence(
            effect=effect / whole, low=(effect - Z * spread) / whole, high=(effect + Z * spread) / whole,
            unit="share of the squared error", p=float(test.pvalue),
            side="supported" if effect > 0 else "contradicted",
            n=len(gains), units="candidates", smallest=POWER * spread / whole,
            floors=guards[0].floors, blocked=blocked,
        )  # fmt: skip

    def _score(self, cells: Cells, candidate: str) -> float:
        score = float(cells.items(candidate, self.readout).mean())
        if not self.share:
            return score
        base = cells.base(candidate)
        floor = cells.needed_floor(candidate, self.readout)
        whole = float(cells.items(base, self.readout).mean()) - floor
        if whole <= 0:
            raise Refusal(f"{base} is not above the floor on {self.readout.label()}, so it has no share.")
        return (score - floor) / whole


def _left_out(x: Floats, y: Floats, degree: int) -> Floats:
    """Return the error of each point under the polynomial through all others."""
    columns = np.vander(x, degree + 1)
    hat = columns @ np.linalg.pinv(columns)
    return np.asarray((y - hat @ y) / np.maximum(1 - np.diag(hat), 1e-9))
