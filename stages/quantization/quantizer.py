"""The settings every weight quantizer shares."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from stages.compress.method import WeightMethod
from stages.core.errors import Refusal
from stages.model.grid import Integers, Quantized

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from stages.model.blocks import Linear
    from stages.model.stream import Empty

UNLOADED = (
    "its packed linears do not load, and nothing else has their inputs rounded; awq, gptq or rtn quantize "
    "its weights alone"
)
CONV1D = "no format runs Conv1D with 8-bit inputs; awq, gptq or rtn quantize its weights alone"


class Quantizer(WeightMethod):
    """Put every linear on a number grid; a method whose grid is fixed fixes the two fields.

    One that has a linear's inputs rounded as well, when the model runs, sets `rounds_inputs`.
    """

    bits: int
    """Of one code."""
    group_size: int | None
    """Input columns that share a scale; it must divide every linear's input width. null: one a row."""

    @property
    def rounds_inputs(self) -> bool:
        """Whether the checkpoint has its reader round the inputs of linears too."""
        return False

    @property
    def refuses(self) -> Mapping[str, str]:
        """GPT-2 where inputs are rounded: its linears are Conv1D, which compressed-tensors skips."""
        return {"gpt2": CONV1D} if self.rounds_inputs else {}

    def plan(self, source: "Empty", windows: "Callable[[], Tensor]") -> int:
        """The number of linears.

        Raises:
            Refusal: `group_size` does not divide the inputs of some of them; or inputs are to be rounded
                of Conv1D or of linears that do not load when packed.
        """
        from stages.model.blocks import linears
        from stages.model.packed import loads_packed

        model = source.model
        found = linears(model, self.ignore)
        if self.rounds_inputs and any(one.transposed for one in found):
            raise Refusal(f"{self.method} does not serve {type(model).__name__}: {CONV1D}.")
        if self.rounds_inputs and not loads_packed(model, [one.name for one in found]):
            raise Refusal(f"{self.method} does not serve {type(model).__name__}: {UNLOADED}.")
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
