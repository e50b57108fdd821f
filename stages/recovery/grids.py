"""The number grid of a quantized source, on which its recovery may have to end.

A quantized source is trained as plain weights. What becomes of them is for the recipe to say: rounded again
on the source's own grid, scales and zero points as they are, or written dense. The grid is read from the
source's files, so a source whose codes no format holds (`fake_quantized`) has none any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.numbers import no_grad
from stages.model.artifact import load_config, load_record
from stages.model.blocks import linears
from stages.model.grid import Codes, Quantized

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from stages.recovery.tuning import Tuning

Code = TypeVar("Code", bound=Quantized)
SourceGrid = Mapping[str, Quantized]
"""What each quantized linear of a source is stored as, by the linear's full name."""


def check(recipe: Tuning) -> None:
    """Hold the recipe against how its source is stored; no weight is read.

    Raises:
        Refusal: `requantize` is missing, given for nothing, or cannot be done; or a method that trains on
            the grid has none, or one it does not serve.
    """
    from stages.model.packed import FORMATS

    source, layout = recipe.source, load_record(recipe.source)["layout"]
    said = getattr(recipe, "requantize", None)
    fake = f"{source} is fake_quantized: no format holds its codes, so its files do not have its grid"
    if recipe.on_grid:
        if layout == "dense":
            raise Refusal(f"{recipe.method} trains on its source's grid and {source} is dense; quantize it.")
        if layout == "fake_quantized":
            raise Refusal(f"{recipe.method} trains on its source's grid: {fake}; take lora or full.")
        if not issubclass(FORMATS[layout], Codes):
            raise Refusal(
                f"{recipe.method} serves grids of integers, and {source} is {layout}; take lora or full with "
                "requantize: true, or a source of another quantizer."
            )
    elif layout == "dense" and said is not None:
        raise Refusal(f"requantize is given, but {source} is dense and has no grid; leave it out.")
    elif layout != "dense" and said is None:
        raise Refusal(
            f"{source} is quantized; add requantize: true to round the result on its grid again, or false "
            "to write a dense checkpoint."
        )
    elif layout == "fake_quantized" and said:
        raise Refusal(f"requantize cannot be true: {fake}; write a dense checkpoint by false.")


def source_grid(artifact: str, model: PreTrainedModel) -> SourceGrid | None:
    """The grid that the linears of `artifact` are stored on; None where they are stored dense.

    Args:
        model: of the artifact; only the names of its parameters and its device are looked at.
    """
    from stages.model.packed import scheme_of
    from stages.model.source import Files

    config = load_config(artifact)
    files = Files(artifact, model, scheme_of(config))
    found = {
        name.removesuffix(".weight"): _moved(code, model.device)
        for name, _ in model.named_parameters()
        if (code := files.code(name)) is not None
    }
    return found or None


def integers(grid: SourceGrid | None) -> dict[str, Codes]:
    """The grid of a source that `check` has let pass for a method that trains on it."""
    return {name: code for name, code in (grid or {}).items() if isinstance(code, Codes)}


def unfrozen(model: PreTrainedModel, grid: SourceGrid, ignore: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """The weights of `model` on `grid`, by linear, which alone get gradients from here on, in fp32."""
    model.requires_grad_(False)
    names = [one.name for one in linears(model, ignore) if one.name in grid]
    weights = {name: model.get_parameter(f"{name}.weight") for name in names}
    for weight in weights.values():
        weight.requires_grad_(True)
        weight.grad_dtype = torch.float32
    return weights


def _moved(code: Any, device: torch.device) -> Any:
    tensors = {
        field: value.to(device) for field, value in vars(code).items() if isinstance(value, torch.Tensor)
    }
    return replace(code, **tensors)


def rounded(name: str, code: Code, weight: Tensor) -> Code:
    """`weight` on the grid of `code`.

    Raises:
        Refusal: it is not all numbers; rounding would make some of what is none.
    """
    if not weight.isfinite().all():
        raise Refusal(f"the trained weights of {name} became NaN or infinite; lower learning_rate.")
    made: Code = code.requantize(weight)
    return made


@no_grad
def put_on(grid: SourceGrid, model: PreTrainedModel) -> dict[str, Quantized]:
    """Round the linears of `model` to `grid`, in place, and return their codes by name. Zeros stay zero.

    Raises:
        Refusal: see `rounded`.
    """
    codes = {}
    for name, code in grid.items():
        weight = model.get_parameter(f"{name}.weight")
        codes[name] = rounded(name, code, weight)
        weight.copy_(codes[name].dequantize())
    return codes
