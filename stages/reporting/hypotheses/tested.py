"""What all hypotheses share: the claim in words, its control, and whom it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from stages.core.schema import Candidate, Slug, Strict
from stages.reporting.hypotheses.readout import Readout

if TYPE_CHECKING:
    from stages.reporting.hypotheses.cells import Cells
    from stages.reporting.hypotheses.evidence import Evidence


class Tested(Strict):
    """A claim that a test judges."""

    claim: Annotated[str, Field(min_length=1)]
    """The claim in one sentence."""
    control: Slug | None = None
    """Another hypothesis of the study that must be supported, or this one is undecided."""
    reference: Candidate | None = None
    """The candidate that must be above its floor for a loss to show; null: the dense base."""

    def candidates_read(self) -> Sequence[str]:
        """Return the candidates whose scores the test reads, `reference` left out."""
        raise NotImplementedError

    def readouts_read(self) -> Sequence[Readout]:
        """Return the measures that it reads, budgets and levels filled in."""
        raise NotImplementedError

    def measured(self) -> Sequence[tuple[str, int]]:
        """Return each candidate and batch size whose measurements it reads."""
        return ()

    def mistakes(self) -> Iterator[str]:
        """Yield what is wrong with the settings beside each other, starting with the field's name."""
        yield from ()

    def judge(self, cells: Cells) -> Evidence:
        """Test the claim; pure, the same tables give the same finding."""
        raise NotImplementedError
