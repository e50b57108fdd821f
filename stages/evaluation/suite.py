"""What all kinds of suites share: the data they score, a batch size, and the way they ask a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, TypeAlias

from pydantic import Field

from stages.core.schema import Strict
from stages.core.tables import Sample, Score

if TYPE_CHECKING:
    from lm_eval.api.model import LM

SuiteRows: TypeAlias = tuple[list[Score], list[Sample]]
"""Score rows and sample rows."""


class Suite(Strict):
    """Questions that every candidate is asked; each kind of suite is a subclass."""

    scores: ClassVar[type[Strict]]
    """The kind of data set it scores, which has the suite's own name."""
    batch_size: Annotated[int, Field(ge=1)]
    """Requests a forward; in bf16 it changes some answers."""

    def evaluate(self, lm: LM, name: str, seed: int) -> SuiteRows:
        """Ask `lm` the suite `name`.

        Raises:
            Refusal: the data or the model does not fit the suite.
        """
        raise NotImplementedError
