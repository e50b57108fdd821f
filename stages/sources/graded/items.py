"""Graded tasks: one task at several levels of difficulty, spread finely around what a small model can do.

Whether compression hurts hard tasks more than easy ones can be measured only where difficulty changes and
nothing else does (2310.02277). A level fixes the settings that generate its items. These settings can be read
back from an item, so two levels that ask differently share none. Every item has two readouts, free generation
and likelihood among choices (four unless a level says otherwise), so that the readout is not confounded with
the task. Wrong choices are near misses, and the right one is equally likely in each place. Few-shot examples,
training items and test items are disjoint by a key of the item, such as its terms in order. Every draw
follows from the seed.

A task has a second kind of difficulty, that of its presentation: irrelevant sentences before the question
(`context`), or solved examples in the item itself (`shots`). Levels that differ in nothing else ask the same
items, so that they can be compared item by item.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from stages.core.errors import Refusal
from stages.core.lazy import pd
from stages.core.schema import Seed, Slug, Strict
from stages.sources.dataset import Dataset

CHOICES = 4
"""Choices per item."""
MAX_DRAWS = 40_000
"""Draws from a level's generator, after which the level counts as exhausted."""
STEPS = "steps"
"""The column of an item's worked solution, in kinds that have one."""
GRADED_SPLITS = ("fewshot", "test", "train")
NOUNS = """
    apple arrow basket beach bell bird boat book bottle bread bridge brush button candle carpet castle
    chair cloud coat corner cup desk dog door dream drum egg engine farm fence field fire fish flag
    floor flower forest fork frog garden gate glass glove goat gold grape grass hammer hand harbour
    hat hill horse house island jacket jar key king kite ladder lake lamp leaf lemon letter lion map
    market mirror moon mountain mouse nail nest night ocean onion orange oven owl paint paper path
    pencil piano pillow pipe plate pocket pond queen rabbit rain ribbon ring river road robe rocket
    roof rope rose sail salt sand school shadow sheep shelf shirt shoe silver snow song spoon spring
    stone storm street sugar summer table tent tiger tower town train tree tunnel uncle valley vase
    violin voice wagon wall water wheel window winter wolf wood wool yard zebra
""".split()  # noqa: SIM905
"""Common words, for tasks in which their meaning plays no part."""


_SENTENCES = (
    "bright brisk calm cold dark fair gentle grey mild pale quiet warm",
    "baker captain clerk doctor driver farmer guest neighbour painter sailor teacher writer",
    "arrived departed hesitated laughed listened nodded paused rested sang smiled waited waved",
    "again alone briefly early gladly late often slowly soon twice warmly yesterday",
)
"""The words of irrelevant sentences, by their place."""


class Level(Strict):
    """A level of difficulty; each kind of task adds its own settings."""

    presentation: ClassVar[tuple[str, ...]] = ("context", "shots")
    """The settings that change how an item is shown and not what is asked."""
    name: Slug
    context: Annotated[int, Field(ge=0, le=256)] = 0
    """Irrelevant sentences of five words before the question."""
    shots: Annotated[int, Field(ge=0)] = 0
    """Examples of the level in front of each item, beside those that a suite shows."""

    def asked(self) -> Level:
        """Return the level without name and presentation: levels that are then equal ask the same items."""
        fields = type(self).model_fields
        plain = {key: fields[key].default for key in self.presentation}
        return self.model_copy(update={"name": "any", **plain})

    def domain(self) -> Level:
        """Return the level that stands for all that may have the same items, however these are shown."""
        return self.asked()


class GradedData(Dataset):
    """A task in levels, easiest first."""

    reading: ClassVar[str]
    """How an answer is read: a key of `stages.corpus.readings.READINGS`."""
    answer_tokens: ClassVar[int]
    """The most tokens that are generated for an answer."""
    columns: ClassVar[tuple[str, ...]] = ("difficulty", "question", "answer", "choices", "gold")

    levels: Annotated[tuple[Level, ...], Field(min_length=1)]
    test: Annotated[int, Field(ge=1)]
    """Test items per level."""
    train: Annotated[int, Field(ge=0)] = 0
    """Training items per level."""
    fewshot: Annotated[int, Field(ge=0)] = 1
    """Few-shot examples per level."""
    seed: Seed

    @property
    def num_examples(self) -> int:
        """The number of few-shot examples over all levels."""
        return self.fewshot * len(self.levels)

    @field_validator("levels")
    @classmethod
    def _distinct(cls, levels: tuple[Level, ...]) -> tuple[Level, ...]:
        """Refuse levels with the same name, which would share a score, or the same settings, hence the same
        items.

        The score over all levels is named `all`.
        """
        for number, level in enumerate(levels):
            if level.name == "all":
                raise ValueError("the name all is reserved for the score over all levels; rename that level")
            for other in levels[:number]:
                if level.name == other.name:
                    raise ValueError(f"two levels are named {level.name}; rename one")
                if level.model_copy(update={"name": other.name}) == other:
                    raise ValueError(f"{other.name} and {level.name} have the same settings; remove one")
        return levels

    @model_validator(mode="after")
    def _enough_examples(self) -> Self:
        for level in self.levels:
            if level.shots > self.fewshot:
                raise ValueError(
                    f"level {level.name} shows {level.shots} shots, but a level has fewshot {self.fewshot} "
                    "examples; lower shots or raise fewshot"
                )
        return self

    def draw_items(self, level: Any, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield at most `MAX_DRAWS` items of a level, each after its key; the same at each call.

        Items with the same key are the same question to anyone who knows the task; keys may repeat.
        """
        raise NotImplementedError

    def write(self, folder: Path) -> dict[str, Any]:
        """Write `fewshot`, `train` and `test.parquet`, with the kind's `columns`.

        Raises:
            Refusal: a level has too few distinct items.
        """
        splits: dict[str, list[dict[str, Any]]] = {split: [] for split in GRADED_SPLITS}
        asked = [level.asked() for level in self.levels]
        for level, plain in zip(self.levels, asked, strict=True):
            seed = self.seed + asked.index(plain)
            items = self.items(level, self.fewshot + self.test + self.train, seed)
            examples = [shown(item, level, ()) for item in items[: self.fewshot]]
            rest = iter(shown(item, level, examples[: level.shots]) for item in items[self.fewshot :])
            splits["fewshot"] += examples
            for split in ("test", "train"):
                splits[split] += [next(rest) for _ in range(getattr(self, split))]
        for split, rows in splits.items():
            pd.DataFrame(rows, columns=list(self.columns)).to_parquet(folder / f"{split}.parquet")
        return {
            "items": {split: len(rows) for split, rows in splits.items()},
            "answer": {"reading": self.reading, "tokens": self.answer_tokens},
        }

    def items(self, level: Level, count: int, seed: int) -> list[dict[str, Any]]:
        """Return the first `count` items of a level that have distinct keys.

        Raises:
            Refusal: the level has fewer.
        """
        distinct: dict[str, dict[str, Any]] = {}
        for key, item in self.draw_items(level, seed) if count else ():
            distinct.setdefault(key, item)
            if len(distinct) == count:
                return list(distinct.values())
        if count:
            raise Refusal(
                f"level {level.name} has {len(distinct)} distinct items, fewer than {count}; lower test, "
                "train or fewshot."
            )
        return []


def shown(item: dict[str, Any], level: Level, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return an item as its level presents it: after `examples`, a line each, and irrelevant sentences."""
    draw = random.Random(item["question"])
    sentences = [
        " ".join(["The", *(draw.choice(words.split()) for words in _SENTENCES)]) for _ in range(level.context)
    ]
    lines = [f"{example['question']} {example['answer']}\n" for example in examples]
    context = "".join(f"{sentence}. " for sentence in sentences)
    return item | {"question": f"{''.join(lines)}{context}{item['question']}"}


def choice_item(
    difficulty: str,
    question: str,
    answer: str,
    wrong: Sequence[str],
    draw: random.Random,
    count: int = CHOICES,
) -> dict[str, Any]:
    """Return an item with `count` choices: the answer and some drawn from `wrong`, in a drawn order.

    Args:
        wrong: distinct near misses, at least `count` - 1.
    """
    choices = [answer, *draw.sample(wrong, count - 1)]
    draw.shuffle(choices)
    return {
        "difficulty": difficulty,
        "question": question,
        "answer": answer,
        "choices": choices,
        "gold": choices.index(answer),
    }
