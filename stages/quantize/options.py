"""The settings every weight quantizer shares."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from stages.core.errors import Refusal
from stages.core.grid import Integers, Quantized
from stages.core.method import WeightMethod

if TYPE_CHECKING:
    from torch import Tensor

    from stages.core.blocks import Linear
    from stages.core.stream import Empty


class Quantizer(WeightMethod):
    """Put every linear on a number grid; a method whose grid is fixed fixes the two fields."""

    bits: int
    """Of one code."""
    group_size: int | None
    """Input columns that share a scale; it must divide every linear's input width. null: one a row."""

    def plan(self, look: "Callable[[], Empty]") -> int:
        """The number of linears.

        Raises:
            Refusal: `group_size` does not divide the inputs of some of them.
        """
        from stages.core.blocks import linears

        found = linears(look().model, self.ignore)
        if self.group_size and (
            uneven := [one.name for one in found if one.weight.shape[1] % self.group_size]
        ):
            raise Refusal(
                f"group_size {self.group_size} does not divide the input of {len(uneven)} linears: "
                f"{', '.join(uneven[:8])}; take a divisor of every input width, or null for one scale a row."
            )
        return len(found)

    def replace(self, linear: "Linear", statistic: Any, plan: int) -> Quantized:
        """The codes of a linear's weight."""
        return self.weights(linear.weight, statistic)

    def weights(self, weight: "Tensor", statistic: Any) -> Quantized:
        """The codes of `weight` `[out, in]`; its zeros stay zero."""
        raise NotImplementedError

    def notes(self, plan: int) -> dict[str, Any]:
        """How many linears were quantized, for whoever counts them in the file."""
        return {"quantized_linears": plan}


class IntegerQuantizer(Quantizer):
    """Integer codes of `bits` bits with one scale for every `group_size` columns."""

    bits: Annotated[int, Field(ge=2, le=8)]
    group_size: Annotated[int, Field(ge=8)] | None
    """Input columns that share a scale; it must divide every linear's input width. null: one a row."""
    symmetric: bool = True
    """Whether codes reach as far below zero as above; false spans each group exactly, for a zero point."""

    @property
    def grid(self) -> Integers:
        """The grid these settings describe."""
        return Integers(self.bits, self.group_size, self.symmetric)
