"""Data that recipes learn from: it must exist, be set apart for learning, and fit the recipe's settings."""

from collections.abc import Iterator
from typing import Any

from stages.core.errors import Refusal
from stages.core.schema import Strict
from stages.corpus.examples import Selection
from stages.job.lineage import ancestors
from stages.job.params import Params
from stages.job.sentences import allowed
from stages.sources.benchmark import Benchmark
from stages.sources.conversations import Conversations
from stages.sources.graded.items import GradedData
from stages.sources.mix import Mix
from stages.sources.task import OwnTask
from stages.sources.text import Text
from stages.teaching.answers import Answers
from stages.teaching.logits import Logits
from stages.teaching.teaching import Teaching

PAIRED = ("split", "prompt", "completion")
FIT: tuple[tuple[type[Strict], str, tuple[str, ...], tuple[str, ...]], ...] = (
    (Text, "running text", ("difficulty", "chat_template", "packing", *PAIRED), ()),
    (Mix, "running text", ("difficulty", "chat_template", "packing", *PAIRED), ()),
    (GradedData, "graded items", PAIRED, ()),
    (Benchmark, "a benchmark", ("difficulty",), PAIRED),
    (OwnTask, "a task", ("difficulty",), PAIRED),
    (Conversations, "conversations", ("difficulty", *PAIRED), ()),
    (Teaching, "made by a teacher, in tokens already", ("chat_template", "bos", *PAIRED), ()),
)
"""Kinds of data sets: class, name in messages, settings of `Selection` they cannot use, those they need."""


def of_chosen(at: str, chosen: Selection, params: Params) -> Iterator[str]:
    """Yield a data set that is missing or has nothing to learn from, or settings that do not fit it."""
    name = chosen.dataset
    dataset = params.datasets.get(name) or params.teach.get(name)
    if dataset is None:
        usable = [
            key
            for key, other in params.datasets.items()
            if isinstance(other, Benchmark | OwnTask | Conversations) or learnable(other)
        ]
        yield f"{at}.dataset: there is no {name!r}; {allowed([*usable, *params.teach], name)}."
        return
    if isinstance(dataset, Text | GradedData) and not learnable(dataset):
        yield all_evaluated(at, name, dataset)
    kind, unusable, needed = next(facts for config, *facts in FIT if isinstance(dataset, config))
    answers = isinstance(chosen, Answers)
    if isinstance(chosen, Teaching) and isinstance(dataset, Conversations):
        yield f"{at}.dataset: {name} is conversations, which have their responses; train on them directly."
        return
    if answers and isinstance(dataset, Text | Mix | Teaching):
        asking = [
            key for key, other in params.datasets.items() if not isinstance(other, Text | Mix | Conversations)
        ]
        yield f"{at}.dataset: {name} is {kind}, with no questions to answer; {allowed(asking)}."
        return
    fields = type(chosen).model_fields
    if spare := [key for key in unusable if key in fields and getattr(chosen, key) != fields[key].default]:
        yield f"{at}: {name} is {kind}, which has no use for {', '.join(spare)}; leave that out."
    if missing := [
        key for key in needed if getattr(chosen, key) is None and not (answers and key == "completion")
    ]:
        yield f"{at}: {name} is {kind}, so {', '.join(missing)} must be given."
    if isinstance(chosen, Answers) and (excess := too_many_shots(at, name, chosen.shots, dataset)):
        yield excess
    levels = [level.name for level in dataset.levels] if isinstance(dataset, GradedData) else []
    if levels and chosen.difficulty not in (None, *levels):
        yield f"{at}.difficulty: there is no {chosen.difficulty!r}; {allowed(levels, chosen.difficulty)}."


def of_teaching(params: Params) -> Iterator[str]:
    """Yield names used twice, data sets made from themselves, and distillation without a teacher."""
    for name in params.teach:
        if name in params.datasets:
            yield f"teach.{name}: datasets has this name too, and both are data sets; rename one."
        if f"teach/{name}" in ancestors(params, f"teach/{name}"):
            yield (
                f"teach.{name}: a cycle, its teacher or its data set is made from itself; use a teacher that "
                "is not trained on it."
            )
    with_logits = [key for key, teaching in params.teach.items() if isinstance(teaching, Logits)]
    for name, recipe in params.finetune.items():
        if recipe.distillation is not None and recipe.train.dataset not in with_logits:
            yield (
                f"finetune.{name}.distillation: {recipe.train.dataset} holds no teacher's logits; leave "
                "distillation out, or train on a data set that section teach makes by method logits; "
                f"{allowed(with_logits)}."
            )


def of_conversations(params: Params) -> Iterator[str]:
    """Yield conversations on this machine that cannot be read, or that are fewer than recipes take."""
    for name, dataset in params.datasets.items():
        if not isinstance(dataset, Conversations) or not dataset.source.startswith("path:"):
            continue
        try:
            count = len(dataset.read())
        except Refusal as refusal:
            yield f"datasets.{name}: {refusal}"
            continue
        for key, recipe in params.finetune.items():
            chosen = recipe.train
            if chosen.dataset == name and (needed := chosen.num_samples + chosen.held_out) > count:
                yield (
                    f"finetune.{key}.train: num_samples {chosen.num_samples} and held_out {chosen.held_out} "
                    f"take {needed} conversations, but {name} has {count}; lower them."
                )


def too_many_shots(at: str, name: str, shots: int, dataset: Any) -> str | None:
    """Say that `shots` exceed the few-shot examples of a data set; only graded ones have any."""
    available = dataset.num_examples if isinstance(dataset, GradedData) else 0
    if shots <= available:
        return None
    cure = "lower shots or raise fewshot" if isinstance(dataset, GradedData) else "set shots to 0"
    return f"{at}.shots: {shots} given; datasets.{name} has {available} few-shot examples; {cure}."


def all_evaluated(at: str, name: str, dataset: Any) -> str:
    """Say that a data set is kept for evaluation as a whole."""
    kept, option, meaning = (
        ("text", "calibration", "the share")
        if isinstance(dataset, Text)
        else ("items", "train", "the number of items a level")
    )
    return (
        f"{at}.dataset: {name} keeps all its {kept} for evaluation; set datasets.{name}.{option} to "
        f"{meaning} that may be learned from."
    )


def learnable(dataset: Any) -> bool:
    """Tell whether part of a data set is set apart to be learned from."""
    if isinstance(dataset, GradedData):
        return dataset.train > 0
    return isinstance(dataset, Mix) or (isinstance(dataset, Text) and dataset.calibration > 0)
