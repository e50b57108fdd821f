"""What a recipe is made from and with: text that is not there, groups that divide no width."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, get_origin

from stages.core.calibration import Tokens, Windows
from stages.core.problems.learning import all_evaluated, learnable, of_chosen
from stages.core.schema import Strict
from stages.core.sentences import allowed
from stages.download.graded import Graded
from stages.download.text import Text
from stages.finetune.examples import Chosen
from stages.prune.tasks import Items

if TYPE_CHECKING:
    from stages.core.params import Params


def of_recipes(params: "Params", broken: set[str]) -> Iterator[str]:
    texts = {name for name, dataset in params.datasets.items() if learnable(dataset)}
    for artifact, recipe in params.recipes().items():
        at = artifact.replace("/", ".", 1)
        if isinstance(recipe, Chosen):
            yield from of_chosen(at, recipe, params, broken)
        for field in ("calibration", "train"):
            wanted = getattr(recipe, field, None)
            if isinstance(wanted, Chosen):
                yield from of_chosen(f"{at}.{field}", wanted, params, broken)
            if not isinstance(wanted, Windows | Items) or wanted.dataset in broken:
                continue
            if isinstance(wanted, Tokens) and wanted.tokens == "random":
                continue
            name, dataset = wanted.dataset, params.datasets.get(wanted.dataset)
            if isinstance(wanted, Items) and not isinstance(dataset, Graded):
                graded = [key for key, found in params.datasets.items() if isinstance(found, Graded)]
                yield f"{at}.{field}.dataset: {name!r} has no graded items; {allowed(graded, name)}."
            elif not isinstance(dataset, Text | Graded):
                why = "is no text" if dataset else "is not there"
                yield f"{at}.{field}.dataset: {name!r} {why}; {allowed(texts, name)}."
            elif not learnable(dataset):
                yield all_evaluated(f"{at}.{field}", name, dataset)
            elif (
                isinstance(wanted, Items)
                and isinstance(dataset, Graded)
                and wanted.shots > (have := dataset.fewshot * len(dataset.levels))
            ):
                yield f"{at}.{field}.shots: {wanted.shots} given; datasets.{name} has {have} examples."
        base = params.base_of(artifact)
        # Where linears are left alone or cut on the way, which widths there are is known only at run time.
        known = base and not getattr(recipe, "ignore", ()) and not params.reshaped(artifact)
        widths = params.models[base].in_features if base and known else ()
        if base and widths:
            yield from _of_groups(at, recipe, base, widths)
            if isinstance(grid := getattr(recipe, "grid", None), Strict):
                yield from _of_groups(f"{at}.grid", grid, base, widths)


def _of_groups(at: str, settings: Strict, base: str, widths: tuple[int, ...]) -> Iterator[str]:
    """A group_size that does not divide input widths of linears of `base`."""
    size = getattr(settings, "group_size", None)
    if not size or not (uneven := [str(width) for width in widths if width % size]):
        return
    fixed = get_origin(type(settings).model_fields["group_size"].annotation) is Literal
    fitting = [n for n in range(8, min(widths) + 1) if not any(width % n for width in widths)]
    cure = (
        "this method has no other; take another method, or list those linears in ignore"
        if fixed
        else f"allowed: {', '.join([*map(str, fitting), 'null'])}"
    )
    yield (
        f"{at}.group_size: {size} does not divide {', '.join(uneven)}, the input width of linears of {base}; "
        f"{cure}."
    )
