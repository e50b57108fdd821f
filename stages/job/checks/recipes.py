"""What recipes read and how they group weights: data must exist and fit, groups must divide every width."""

from collections.abc import Iterator
from typing import Literal, get_origin

from stages.core.consent import ALLOW, commands_are_allowed
from stages.core.schema import CONTROLS, Strict
from stages.corpus.examples import Selection
from stages.job.checks.learning import all_evaluated, learnable, of_chosen, too_many_shots
from stages.job.params import Params
from stages.job.sentences import allowed
from stages.pruning.depth.tasks import Items
from stages.pruning.policy import Command
from stages.sources.graded.items import GradedData
from stages.sources.mix import Mix
from stages.sources.published import Published
from stages.sources.text import Text


def of_recipes(params: Params, broken: set[str]) -> Iterator[str]:
    """Yield recipes whose data is missing, unfit or kept for evaluation, or whose groups do not divide.

    Args:
        broken: data sets with mistakes of their own.
    """
    for artifact, recipe in params.recipes().items():
        at = artifact.replace("/", ".", 1)
        if isinstance(policy := getattr(recipe, "policy", None), Command) and not commands_are_allowed():
            yield (
                f"{at}.policy: it runs the program {policy.command[0]!r} on this machine; if you trust "
                f"params.yaml, set {ALLOW}=1 in the environment."
            )
        for field, text in recipe.reads().items():
            where = f"{at}.{field}".rstrip(".")
            if text.dataset in broken:
                continue
            if isinstance(text, Selection):
                yield from of_chosen(where, text, params)
            elif isinstance(text, Items):
                yield from _of_items(where, text, params)
            else:
                yield from _of_text(where, text.dataset, params)
        base = params.base_of(artifact)
        if base and isinstance(params.models[base], Published):
            if not artifact.startswith(CONTROLS):
                yield (
                    f"{at}.source: base/{base} is a published compressed checkpoint (format: packed), "
                    "which is only evaluated; start from the model that it was made from."
                )
            continue
        # Which widths there are is known only at run time if linears are ignored, or cut on the way.
        if base and not getattr(recipe, "ignore", ()) and not _reshaped(params, artifact):
            widths = params.models[base].in_features
            yield from _of_groups(at, recipe, base, widths)
            if isinstance(grid := getattr(recipe, "grid", None), Strict):
                yield from _of_groups(f"{at}.grid", grid, base, widths)


def _reshaped(params: Params, artifact: str) -> bool:
    """Tell whether an artifact has linears of other widths than the model it descends from."""
    recipes = params.recipes()
    return any(getattr(recipes.get(step), "reshapes", False) for step in params.lineage(artifact))


def _of_items(at: str, items: Items, params: Params) -> Iterator[str]:
    dataset = params.datasets.get(items.dataset)
    if not isinstance(dataset, GradedData):
        graded = [name for name, other in params.datasets.items() if isinstance(other, GradedData)]
        yield f"{at}.dataset: {items.dataset!r} has no graded items; {allowed(graded, items.dataset)}."
    elif not learnable(dataset):
        yield all_evaluated(at, items.dataset, dataset)
    elif excess := too_many_shots(at, items.dataset, items.shots, dataset):
        yield excess


def _of_text(at: str, name: str, params: Params) -> Iterator[str]:
    dataset = params.datasets.get(name)
    if not isinstance(dataset, Text | Mix | GradedData):
        texts = [key for key, other in params.datasets.items() if learnable(other)]
        fault = f"{name!r} is no text" if dataset else f"there is no {name!r}"
        yield f"{at}.dataset: {fault}; {allowed(texts, name)}."
    elif not learnable(dataset):
        yield all_evaluated(at, name, dataset)


def _of_groups(at: str, settings: Strict, base: str, widths: tuple[int, ...]) -> Iterator[str]:
    """Yield a group_size that does not divide the input widths of all linears of `base`."""
    size = getattr(settings, "group_size", None)
    if not size or not (uneven := [str(width) for width in widths if width % size]):
        return
    if get_origin(type(settings).model_fields["group_size"].annotation) is Literal:
        cure = "this method has no other; use another method, or list those linears in ignore"
    else:
        fitting = [n for n in range(8, min(widths) + 1) if not any(width % n for width in widths)]
        cure = f"allowed: {', '.join([*map(str, fitting), 'null'])}"
    yield (
        f"{at}.group_size: {size} does not divide {', '.join(uneven)}, the input width of linears of {base}; "
        f"{cure}."
    )
