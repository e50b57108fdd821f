"""Section `report` of params.yaml: how a plain comparison judges differences."""

from typing import Annotated

from pydantic import Field

from stages.core.schema import Candidate, Strict


class Report(Strict):
    """What counts as the same, and whom candidates are compared with."""

    margin: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """The largest loss that does not matter: 0.02 is two points of a share, or 2 % of a perplexity."""
    reference: Candidate | None = None
    """The candidate that all others are compared with; null: the dense base of each."""
