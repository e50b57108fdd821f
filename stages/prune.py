"""Prune: take weights, heads, neurons or blocks out of a model by the recipe's method."""

from stages.compress.method import Compression
from stages.core.run import Run
from stages.job.entry import entry
from stages.model.artifact import check_family


def prune(recipe: Compression, run: Run, name: str) -> None:
    """Prune the recipe's source into data/models/prune/<name>."""
    check_family(recipe)
    run.start()
    recipe.execute(f"prune/{name}", run)


if __name__ == "__main__":
    entry(prune)
