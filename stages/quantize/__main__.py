"""Quantize: put a model's weights on a grid by the recipe's method, and write them packed."""

from torch import Tensor

from stages.core import artifact, checkpoint, run
from stages.core.blocks import linears
from stages.core.errors import Refusal
from stages.core.grid import Codes
from stages.core.params import Params
from stages.core.statistics import Statistic
from stages.quantize.options import Quantizer


def quantize(params: Params, name: str) -> None:
    """Quantize the source of recipe `name` into data/models/quantize/<name>; its zeros stay zero."""
    recipe: Quantizer = params.quantize[name]
    params.run.start()
    model = artifact.load_model(recipe.source, params.run, dequantize=True)
    found = linears(model, recipe.ignore)
    if recipe.group_size and (
        uneven := [entry.name for entry in found if entry.weight.shape[1] % recipe.group_size]
    ):
        raise Refusal(
            f"group_size {recipe.group_size} does not divide the input of {len(uneven)} linears: "
            f"{', '.join(uneven[:8])}; take a divisor of every input width, or null for one scale a row."
        )
    masks = checkpoint.zero_masks(found)
    codes: dict[str, Codes] = {}

    def replace(linear: str, weight: Tensor, statistic: Statistic | None) -> Tensor:
        codes[linear] = recipe.weights(weight, statistic)
        return codes[linear].dequantize()

    count = recipe.compress(model, replace, f"quantize {name}")
    checkpoint.save(
        f"quantize/{name}",
        model,
        recipe.model_dump(mode="json"),
        params.run,
        codes=codes,
        keep=masks,
        notes={"quantized_linears": count},
    )


if __name__ == "__main__":
    run.entry("quantize", quantize, lambda params: list(params.quantize))
