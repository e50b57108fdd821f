"""Quantize: round a model's weights to a number grid by the recipe's method, and write them packed."""

from stages.compress.method import Compression
from stages.core.run import Run
from stages.job.entry import entry
from stages.model.artifact import check_family


def quantize(recipe: Compression, run: Run, name: str) -> None:
    """Quantize the recipe's source into data/models/quantize/<name>."""
    check_family(recipe)
    run.start()
    recipe.execute(f"quantize/{name}", run)


if __name__ == "__main__":
    entry(quantize)
