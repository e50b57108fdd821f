"""Teach: have a model make a data set from another one, once for all its students.

The result, data/datasets/<name>, is named and used like a downloaded data set.
"""

from stages.core.files import DATASETS, writing
from stages.core.run import Run
from stages.corpus.taught import write_lesson
from stages.job.entry import entry
from stages.model.artifact import load_model, load_tokenizer
from stages.teaching.teaching import Teaching


def teach(recipe: Teaching, run: Run, name: str) -> None:
    """Write the lesson of the recipe's source into data/datasets/<name>."""
    run.start()
    tokenizer = load_tokenizer(recipe.source)
    model = load_model(recipe.source, run, dequantize=False)
    lesson = recipe.teach(model, tokenizer)
    with writing(DATASETS / name) as folder:
        write_lesson(folder, name, recipe.model_dump(mode="json"), tokenizer, lesson)


if __name__ == "__main__":
    entry(teach)
