"""A study: a published claim, its source, and the hypotheses that put it to the test."""

from typing import Annotated, Literal

from pydantic import Field

from stages.core.schema import Slug, Strict
from stages.reporting.hypotheses.contrasts import ContrastTest
from stages.reporting.hypotheses.correlations import CorrelationTest
from stages.reporting.hypotheses.fits import FitTest
from stages.reporting.hypotheses.saturations import SaturationTest
from stages.reporting.hypotheses.slopes import SlopeTest
from stages.reporting.hypotheses.trends import TrendTest

Hypothesis = Annotated[
    TrendTest | ContrastTest | SlopeTest | CorrelationTest | SaturationTest | FitTest,
    Field(discriminator="test"),
]


class Missing(Strict):
    """A hypothesis that cannot be tested, as no suite has the scores it needs."""

    claim: Annotated[str, Field(min_length=1)]
    """The claim in one sentence."""
    why: Annotated[str, Field(min_length=1)]
    """The data that is missing."""


class Study(Strict):
    """Hypotheses that are judged, and corrected for their number, together."""

    claim: Annotated[str, Field(min_length=1)]
    """The published claim, in one sentence."""
    source: Annotated[str, Field(min_length=1)]
    """Where it was published, such as `arXiv:2310.02277`."""
    profile: Literal["laptop", "paper"]
    """The size of the sweep that tests it: what a laptop can do, or the publication's own."""
    hypotheses: Annotated[dict[Slug, Hypothesis], Field(min_length=1)]
    no_data: dict[Slug, Missing] = Field(default_factory=dict)
    """Hypotheses whose verdict is `undecided: no data`."""
