"""The outcome of a test, and the verdict that the report prints."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from stages.reporting.statistics.luck import Luck

Side: TypeAlias = Literal["supported", "contradicted"]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """An effect and how surely it lies on its side of the claim."""

    effect: float | None
    low: float | None = None
    high: float | None = None
    """The ends of the 95 % interval."""
    unit: str
    p: float | None
    """The p-value of the side that the effect lies on; None if nothing could be tested."""
    claimed: tuple[float | None, float | None] = (None, None)
    """The ends of the effects that the claim allows; None where it has no end."""
    side: Side | None
    """What the effect says about the claim, however surely."""
    n: int
    """Items, or candidates where these are the units."""
    units: str = "items"
    smallest: float | None = None
    """The smallest effect that these units show in four of five studies, beyond the bound."""
    floors: dict[str, float] = field(default_factory=dict)
    """The floor of each readout that has one."""
    noise: float | None = None
    """How far the effect moves by numerical noise alone; None if unknown."""
    repeats: Luck | None = None
    """The effect over the repeats of its recipes; None if `report.noise` names none of its candidates."""
    blocked: str = ""
    """Why nothing may be concluded, whatever p is; empty if nothing stands against it."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A hypothesis judged within its study."""

    study: str
    hypothesis: str
    test: str
    claim: str
    verdict: Literal["supported", "contradicted", "undecided"]
    finding: Evidence
    p_holm: float | None
    """p after Holm's correction over the study's hypotheses."""
    control: str | None
    """The control and its verdict, such as `a1-control: supported`."""
    why: str
    """The verdict's reason, a sentence."""
    measured: bool = False
    """Whether it rests on measurements of speed or memory, which vary from run to run."""
