"""What all kinds of suites share: the data they score, a batch size, and the way they ask a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Self, TypeAlias

from pydantic import Field, model_validator

from stages.core.backend import LIKELIHOOD, Backend
from stages.core.schema import Strict
from stages.core.tables import Sample, Score

if TYPE_CHECKING:
    from lm_eval.api.model import LM

SuiteRows: TypeAlias = tuple[list[Score], list[Sample]]
"""Score rows and sample rows."""


class Penalties(Strict):
    """What lowers the odds of repetition in generated text; at least one.

    A checkpoint's own `generation_config.json` may name such penalties. They are not used, so that all
    candidates of a suite answer under the same rules.
    """

    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Divides the odds of every token that the prompt or the answer has; see transformers."""
    no_repeat_ngram_size: Annotated[int, Field(ge=1)] | None = None
    """Tokens of a sequence that may occur only once."""

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.options():
            raise ValueError(
                f"name at least one of {', '.join(type(self).model_fields)}, or leave penalties out"
            )
        return self

    def options(self) -> dict[str, float]:
        """Return the options of transformers' `generate`."""
        return self.model_dump(exclude_none=True)


class Suite(Strict):
    """Questions that every candidate is asked; each kind of suite is a subclass."""

    scores: ClassVar[type[Strict]]
    """The kind of data set it scores, which lies under the suite's name."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Requests a forward; in bf16 it changes some answers. null: see `stages.evaluation.room`."""

    backend: Backend = "transformers"
    """The engine that answers; `vllm` where all answers are generated, see `stages.core.backend`."""

    def refuses_vllm(self) -> str | None:
        """Say why vLLM cannot answer the suite; None if it can.

        Raises:
            Refusal: the suite names a task that lm-eval lacks.
        """
        return LIKELIHOOD

    def evaluate(self, lm: LM, name: str, seed: int) -> SuiteRows:
        """Ask `lm` the suite `name`.

        Raises:
            Refusal: the data or the model does not fit the suite.
        """
        raise NotImplementedError
