"""The settings that every weight quantizer shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_origin

from pydantic import Field

from stages.compress.method import WeightMethod
from stages.core.errors import Refusal
from stages.model.blocks import Linear, check_divides, linears
from stages.model.grid import Integers, Quantized

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from stages.model.source import Empty

_NOT_LOADED = (
    "transformers cannot load this family packed, so inputs would not be rounded; use awq, gptq or rtn"
)
_FIXED = "this method has no other group size; use another method, or list these linears in ignore"
_CONV1D = "no format runs Conv1D with 8-bit inputs; use awq, gptq or rtn"


class Quantizer(WeightMethod):
    """Put the weight of every linear on a number grid.

    A method with a fixed grid fixes both fields. One that also rounds the inputs of linears, when the model
    runs, overrides `rounds_inputs`.
    """

    bits: int
    """Bits per code."""
    group_size: int | None
    """Input columns that share a scale; must divide every linear's input width. null: one scale per row."""

    @property
    def rounds_inputs(self) -> bool:
        """Whether a reader of the checkpoint rounds the inputs of linears too."""
        return False

    @property
    def refuses(self) -> Mapping[str, str]:
        """GPT-2 if inputs are rounded: its linears are Conv1D, which compressed-tensors skips."""
        return {"gpt2": _CONV1D} if self.rounds_inputs else {}

    def plan(self, source: Empty, windows: Callable[[], Tensor]) -> int:
        """Return the number of linears.

        Raises:
            Refusal: `group_size` does not divide the input width of some linears; or inputs are to be
                rounded, and linears are Conv1D or do not load packed.
        """
        from stages.model.packed import loads_packed

        model = source.model
        targets = linears(model, self.ignore)
        if self.rounds_inputs and any(linear.transposed for linear in targets):
            raise Refusal(f"{self.method} does not serve {type(model).__name__}: {_CONV1D}.")
        if self.rounds_inputs and not loads_packed(model, [linear.name for linear in targets]):
            raise Refusal(f"{self.method} does not serve {type(model).__name__}: {_NOT_LOADED}.")
        if self.group_size:
            fixed = get_origin(type(self).model_fields["group_size"].annotation) is Literal
            cure = _FIXED if fixed else "set a divisor of every input width, or null for one scale per row"
            check_divides(f"group_size {self.group_size}", self.group_size, targets, cure)
        return len(targets)

    def replace(self, linear: Linear, statistic: Any, plan: int) -> Quantized:
        """Return the codes of a linear's weight."""
        return self.weights(linear.weight, statistic)

    def weights(self, weight: Tensor, statistic: Any) -> Quantized:
        """Return the codes of `weight` `[out, in]`; its zeros stay zero."""
        raise NotImplementedError

    def notes(self, plan: int) -> dict[str, Any]:
        """Record how many linears were quantized."""
        return {"quantized_linears": plan}


class IntegerQuantizer(Quantizer):
    """Integer codes of `bits` bits with one scale per `group_size` columns."""

    bits: Annotated[int, Field(ge=2, le=8)]
    group_size: Annotated[int, Field(ge=8)] | None
    """Input columns that share a scale; must divide every linear's input width. null: one scale per row."""
    symmetric: bool = True
    """Whether codes reach as far below zero as above. False spans each group exactly, with a zero point."""

    @property
    def grid(self) -> Integers:
        """The grid of these settings."""
        return Integers(self.bits, self.group_size, self.symmetric)
