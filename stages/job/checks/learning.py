"""What is learned from: data sets that are not there or keep nothing for it, and who teaches whom."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stages.core.schema import Strict
from stages.corpus.examples import Chosen
from stages.job.lineage import ancestors
from stages.job.sentences import allowed
from stages.sources.benchmark import Benchmark
from stages.sources.graded.items import Graded
from stages.sources.text import Text
from stages.teaching.answers import Answers
from stages.teaching.logits import Logits
from stages.teaching.teaching import Teaching

if TYPE_CHECKING:
    from stages.job.params import Params

PAIRED = ("split", "prompt", "completion")
KINDS: tuple[tuple[type[Strict], str, tuple[str, ...], tuple[str, ...]], ...] = (
    (Text, "running text", ("difficulty", "chat_template", "packing", *PAIRED), ()),
    (Graded, "graded items", PAIRED, ()),
    (Benchmark, "a benchmark", ("difficulty",), PAIRED),
    (Teaching, "made by stages.teach, in tokens already", ("chat_template", *PAIRED), ()),
)
"""Kinds of data sets, what is said of each, the settings of `Chosen` it has no use for, those it needs."""


def of_chosen(at: str, chosen: Chosen, params: "Params") -> Iterator[str]:
    """A data set that is not there or has nothing to learn from, and settings that are not for its kind."""
    name = chosen.dataset
    dataset = params.datasets.get(name) or params.teach.get(name)
    if dataset is None:
        known = [
            key for key, found in params.datasets.items() if isinstance(found, Benchmark) or learnable(found)
        ]
        yield f"{at}.dataset: {name!r} is not there; {allowed([*known, *params.teach], name)}."
        return
    if isinstance(dataset, Text | Graded) and not learnable(dataset):
        yield all_evaluated(at, name, dataset)
    what, idle, needed = next(rest for kind, *rest in KINDS if isinstance(dataset, kind))
    made = isinstance(chosen, Answers)
    if made and isinstance(dataset, Text | Teaching):
        asking = [key for key, found in params.datasets.items() if not isinstance(found, Text)]
        yield f"{at}.dataset: {name} is {what}, with no questions to answer; {allowed(asking)}."
        return
    fields = type(chosen).model_fields
    if spare := [one for one in idle if one in fields and getattr(chosen, one) != fields[one].default]:
        yield f"{at}: {name} is {what}, which has no use for {', '.join(spare)}; leave that out."
    if missing := [
        one for one in needed if getattr(chosen, one) is None and not (made and one == "completion")
    ]:
        yield f"{at}: {name} is {what}, so {', '.join(missing)} must be given."
    if isinstance(chosen, Answers) and chosen.shots:
        have = dataset.num_examples if isinstance(dataset, Graded) else 0
        if chosen.shots > have:
            yield f"{at}.shots: {chosen.shots} given; {name} has {have} few-shot examples; lower it."
    levels = [level.name for level in dataset.levels] if isinstance(dataset, Graded) else []
    if levels and chosen.difficulty not in (None, *levels):
        yield f"{at}.difficulty: there is no {chosen.difficulty!r}; {allowed(levels, chosen.difficulty)}."


def of_teaching(params: "Params") -> Iterator[str]:
    """Names taken twice, data sets that are made from themselves, distillation from no teacher."""
    for name in params.teach:
        if name in params.datasets:
            yield f"teach.{name}: datasets has this name too, and both are data sets; rename one."
        if f"teach/{name}" in ancestors(params, f"teach/{name}"):
            yield (
                f"teach.{name}: a cycle, its teacher or its data set is made from itself; take a "
                "teacher that is not trained on it."
            )
    for name, recipe in params.finetune.items():
        distillation, train = recipe.distillation, recipe.train
        if distillation is None:
            continue
        with_logits = [key for key, found in params.teach.items() if isinstance(found, Logits)]
        if train.dataset not in with_logits:
            yield (
                f"finetune.{name}.distillation: {train.dataset} holds no teacher's logits; leave "
                "distillation out, or train on what section teach makes by method logits; "
                f"{allowed(with_logits)}."
            )


def all_evaluated(at: str, name: str, dataset: Any) -> str:
    kept, option, what = (
        ("text", "calibration", "the share")
        if isinstance(dataset, Text)
        else ("items", "train", "the number of items a level")
    )
    return (
        f"{at}.dataset: {name} keeps all its {kept} for evaluation; set datasets.{name}.{option} to {what} "
        "that may be learned from."
    )


def learnable(dataset: Any) -> bool:
    """Whether some of the data set is set apart to be learned from."""
    if isinstance(dataset, Graded):
        return dataset.train > 0
    return isinstance(dataset, Text) and dataset.calibration > 0
