"""Which numbers a hypothesis reads: scores of a suite (`Readout`), and the x of its candidates (`Axis`)."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from stages.core.schema import Slug, Strict
from stages.core.tables import PARAMETERS_REMOVED, SCORE_COLUMNS, Subject

NUMBERS = (
    *(field.name for field in fields(Subject) if SCORE_COLUMNS[field.name] in ("float64", "Int64")),
    PARAMETERS_REMOVED,
)
"""The columns that hold a number of each candidate, such as its sparsity."""
TIMES = ("seconds_to_first_token", "seconds_per_token")
MEASURED = (*TIMES, "tokens_per_second", "peak_bytes", "joules_per_token")
"""The numbers of each candidate and batch size that `profile` measures; times have repeats."""


class Readout(Strict):
    """A measure of a suite, over all items or at one level of difficulty.

    Leave out what the suite has one of only: a suite with two metrics needs `metric`, one without thinking
    needs no `budget`.
    """

    suite: Slug
    metric: Annotated[str, Field(min_length=1)]
    """A metric of the suite, or `entropy`: of the distribution over the choices, in bits."""
    readout: Literal["likelihood", "generation", "states"] | None = None
    task: str | None = None
    counted: str | None = None
    filter: str | None = None
    budget: Annotated[int, Field(ge=0)] | None = None
    level: str = "all"

    def label(self) -> str:
        """Return a short name."""
        parts = [self.suite, self.metric, self.readout, self.counted, self.filter]
        parts += [f"budget {self.budget}" if self.budget is not None else None]
        parts += [self.level if self.level != "all" else None]
        return " ".join(part for part in parts if part)


def repeated(readout: Readout, *, budget: bool, level: bool) -> Iterator[str]:
    """Yield a budget or level of a readout that the test fills in itself.

    Args:
        budget: whether the test runs over budgets.
        level: whether it runs over levels.
    """
    if budget and readout.budget is not None:
        yield "readout.budget: budgets are listed beside it; leave it out."
    if level and readout.level != "all":
        yield "readout.level: levels are listed beside it; leave it out."


def _numeric(column: str) -> str:
    if column not in (*NUMBERS, *MEASURED):
        raise ValueError(f"allowed: {', '.join((*NUMBERS, *MEASURED))}")
    return column


Column = Annotated[str, AfterValidator(_numeric)]
"""A number that the tables hold for each candidate."""


class Axis(Strict):
    """The x of each candidate, level or budget: a column of the tables, or numbers in the same order."""

    column: Column | None = None
    values: tuple[float, ...] | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """The batch size of a measured column."""
    log2: bool = False

    @model_validator(mode="after")
    def _given_once(self) -> Self:
        if (self.column is None) == (self.values is None):
            raise ValueError("give either column or values")
        if (self.column in MEASURED) != (self.batch_size is not None):
            raise ValueError(f"batch_size goes with a measured column, {', '.join(MEASURED)}")
        if self.log2 and self.values is not None and min(self.values, default=1) <= 0:
            raise ValueError("log2 needs values above 0")
        return self

    def measured(self, candidates: Sequence[str]) -> list[tuple[str, int]]:
        """Return each candidate and batch size whose measurements it reads; none if it reads a table."""
        return [(name, self.batch_size) for name in candidates if self.batch_size is not None]
