"""Prune: zero some of a model's weights by the recipe's method, and write the sparse model."""

from stages.core import artifact, checkpoint, run
from stages.core.blocks import walk
from stages.core.calibration import calibration_windows
from stages.core.params import Params


def prune(params: Params, name: str) -> None:
    """Prune the source of recipe `name` into data/models/prune/<name>."""
    recipe = params.prune[name]
    params.run.start()
    model = artifact.load_model(recipe.source, params.run, dequantize=True)
    data_free = recipe.calibration.dataset == "none"
    walk(
        model,
        lambda _, weight, statistic: recipe.weights(weight, statistic),
        windows=None
        if data_free
        else calibration_windows(artifact.load_tokenizer(recipe.source), recipe.calibration),
        statistic=recipe.statistic,
        ignore=recipe.ignore,
        label=f"prune {name}",
    )
    checkpoint.save(f"prune/{name}", model, recipe.model_dump(mode="json"), params.run)


if __name__ == "__main__":
    run.entry("prune", prune, lambda params: list(params.prune))
