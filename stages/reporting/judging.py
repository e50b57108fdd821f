"""Section `report` of params.yaml: how a plain comparison judges differences."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, Field

from stages.core.schema import Candidate, Slug, Strict


def _enough(repeats: tuple[str, ...]) -> tuple[str, ...]:
    if len(repeats) < 3:
        raise ValueError("allowed: three candidates or more, as fewer hardly show their spread")
    return repeats


class Report(Strict):
    """What counts as the same, and whom candidates are compared with."""

    margin: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """The largest loss that does not matter: 0.02 is two points of a share, or 2 % of a perplexity."""
    reference: Candidate | None = None
    """The candidate that all others are compared with; null: the dense base of each."""
    noise: dict[Slug, Annotated[tuple[Candidate, ...], AfterValidator(_enough)]] = Field(default_factory=dict)
    """The noise of a method: candidates of one recipe that differ in the seeds of their draws alone."""


def repeats_of(candidate: str | None, noise: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the candidates that `noise` lists with this one, itself included; empty if it lists none."""
    return next((group for group in noise.values() if candidate in group), ())
