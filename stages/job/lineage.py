"""Who is made from what: the data behind a recipe, and what must exist before a stage can run."""

from collections.abc import Iterable

from stages.core.files import DATASET, DATASETS, MODELS, RECORD
from stages.job.params import Params


def datasets_of(params: Params, artifact: str) -> list[str]:
    """Return the data sets that a recipe `<stage>/<recipe>` reads itself, taught ones by their own name."""
    recipe = params.recipes().get(artifact)
    return [] if recipe is None else [text.dataset for text in recipe.reads().values()]


def ancestors(params: Params, artifact: str) -> set[str]:
    """Return every recipe that an artifact or taught data set is made from, near or far."""
    recipes = params.recipes()
    behind: set[str] = set()
    todo = [artifact]
    while todo:
        if (recipe := recipes.get(todo.pop())) is None:
            continue
        named = [recipe.source, *(f"teach/{text.dataset}" for text in recipe.reads().values())]
        new = [name for name in named if name in recipes and name not in behind]
        todo += new
        behind |= set(new)
    return behind


def missing_inputs(params: Params, models: Iterable[str], datasets: Iterable[str]) -> list[str]:
    """Say which of these inputs do not exist yet, each with the command that makes it.

    Args:
        models: `<stage>/<recipe>`.
        datasets: names; `none` always exists.
    """
    makers = {MODELS / model / RECORD: _maker(model) for model in models}
    for name in datasets:
        if name != "none":
            aliases = params.suites.datasets
            group = "teach" if name in params.teach else "alias" if name in aliases else "dataset"
            makers[DATASETS / name / DATASET] = f"dvc repro {group}@{name}"
    return [
        f"there is no {path.parent} yet (`{maker}` makes it)"
        for path, maker in makers.items()
        if not path.exists()
    ]


def _maker(model: str) -> str:
    section, key = model.split("/")
    return f"dvc repro {'model' if section == 'base' else section}@{key}"
