"""The number grid of a quantized source, on which its recovery may have to end.

A quantized source is trained as plain weights. The recipe says what becomes of them: they are rounded to the
source's own grid again, with its scales and zero points, or written dense. The grid is read from the source's
files; a source whose codes no format holds (`fake_quantized`) has none there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.numbers import no_grad
from stages.model.artifact import load_config
from stages.model.grid import Quantized

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Code = TypeVar("Code", bound=Quantized)
SourceGrid = Mapping[str, Quantized]
"""The codes of each quantized linear of a source, by the linear's full name."""


def source_grid(artifact: str, model: PreTrainedModel) -> SourceGrid | None:
    """Return the grid on which the linears of `artifact` are stored; None if they are stored dense.

    Args:
        model: of the artifact; only the names of its parameters and its device are used.
    """
    from stages.model.packed import scheme_of
    from stages.model.source import Files

    config = load_config(artifact)
    files = Files(artifact, model, scheme_of(config))
    grid = {
        name.removesuffix(".weight"): _on_device(code, model.device)
        for name, _ in model.named_parameters()
        if (code := files.code(name)) is not None
    }
    return grid or None


def _on_device(code: Any, device: torch.device) -> Any:
    tensors = {
        field: value.to(device) for field, value in vars(code).items() if isinstance(value, torch.Tensor)
    }
    return replace(code, **tensors)


def round_to_grid(name: str, code: Code, weight: Tensor) -> Code:
    """Return the codes of the trained `weight` of linear `name` on the grid of `code`.

    Raises:
        Refusal: some weights are NaN or infinite; rounding would turn them into numbers.
    """
    if not weight.isfinite().all():
        raise Refusal(f"the trained weights of {name} became NaN or infinite; lower learning_rate.")
    codes: Code = code.requantize(weight)
    return codes


@no_grad
def requantize_model(grid: SourceGrid, model: PreTrainedModel) -> dict[str, Quantized]:
    """Round the linears of `model` to `grid`, in place, and return their codes by name. Zeros stay zero.

    Raises:
        Refusal: see `round_to_grid`.
    """
    codes = {}
    for name, code in grid.items():
        weight = model.get_parameter(f"{name}.weight")
        codes[name] = round_to_grid(name, code, weight)
        weight.copy_(codes[name].dequantize())
    return codes
