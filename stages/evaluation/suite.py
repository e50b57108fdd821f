"""What every kind of suite has: the data it scores, its batch size, and how it asks a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from stages.core.schema import Strict

if TYPE_CHECKING:
    from lm_eval.api.model import LM

Rows = list[dict[str, Any]]


class Suite(Strict):
    """Questions that every candidate is asked; a kind of suite derives from it."""

    scores: ClassVar[type[Strict]]
    """The kind of data set it scores, which has the suite's own name."""
    batch_size: Annotated[int, Field(ge=1)]
    """Requests a forward; in bf16 it changes some answers."""

    def evaluate(self, lm: LM, name: str, seed: int) -> tuple[Rows, Rows]:
        """Ask `lm` the suite `name`; return score rows and sample rows.

        Raises:
            Refusal: the data lacks what the suite needs, or the model cannot be asked.
        """
        raise NotImplementedError
