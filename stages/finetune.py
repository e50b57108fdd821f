"""Finetune: train a model to recover what compression cost it."""

from stages.core.run import Run
from stages.job.entry import entry
from stages.model.artifact import check_family
from stages.recovery.recover import recover
from stages.recovery.tuning import Tuning


def finetune(recipe: Tuning, run: Run, name: str) -> None:
    """Fine-tune the recipe's source into data/models/finetune/<name>."""
    check_family(recipe)
    recipe.check_source()
    run.start()
    recover(recipe, run, name)


if __name__ == "__main__":
    entry(finetune)
