"""The settings every weight quantizer shares."""

from typing import Annotated

from pydantic import Field

from stages.core.method import WeightMethod


class Quantizer(WeightMethod):
    """A symmetric integer grid of `bits` bits with one scale for every `group_size` columns."""

    bits: Annotated[int, Field(ge=2, le=8)]
    group_size: Annotated[int, Field(ge=8)] | None
    """Input columns that share a scale; it must divide every linear's input width. null: one a row."""
