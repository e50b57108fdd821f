"""Prune: zero some of a model's weights by the recipe's method, and write the sparse model."""

from stages.core import artifact, checkpoint, run
from stages.core.method import WeightMethod
from stages.core.params import Params


def prune(params: Params, name: str) -> None:
    """Prune the source of recipe `name` into data/models/prune/<name>."""
    recipe: WeightMethod = params.prune[name]
    params.run.start()
    model = artifact.load_model(recipe.source, params.run, dequantize=True)
    recipe.compress(
        model, lambda _, weight, statistic: recipe.weights(weight, statistic), label=f"prune {name}"
    )
    checkpoint.save(f"prune/{name}", model, recipe.model_dump(mode="json"), params.run)


if __name__ == "__main__":
    run.entry("prune", prune, lambda params: list(params.prune))
