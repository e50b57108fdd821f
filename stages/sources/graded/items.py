"""Graded tasks: one task, its difficulties spread finely around a small model's reach.

Whether compression hurts hard tasks more than easy ones can only be asked where difficulty changes and
nothing else does (2310.02277). A level fixes the settings of its items' generator, and these can be read
off an item again, so that two levels share none. Every item is asked in two readouts, free generation and
likelihood among four choices, so that the readout is not confounded with the task; the wrong choices are
near misses, and the right one stands at each place alike. Few-shot examples, training items and test items
are disjoint by a key of the item, such as its terms in order. All is drawn from the seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from stages.core.errors import Refusal
from stages.core.lazy import pd
from stages.core.schema import Seed, Slug, Strict
from stages.sources.dataset import Dataset

CHOICES = 4
TRIES = 40_000
"""Draws of a level's generator; where they do not bring the items asked for, there are no more."""
SPLITS = ("fewshot", "test", "train")
VOCABULARY = (
    "apple arrow basket beach bell bird boat book bottle bread bridge brush button candle carpet castle "
    "chair cloud coat corner cup desk dog door dream drum egg engine farm fence field fire fish flag "
    "floor flower forest fork frog garden gate glass glove goat gold grape grass hammer hand harbour "
    "hat hill horse house island jacket jar key king kite ladder lake lamp leaf lemon letter lion map "
    "market mirror moon mountain mouse nail nest night ocean onion orange oven owl paint paper path "
    "pencil piano pillow pipe plate pocket pond queen rabbit rain ribbon ring river road robe rocket "
    "roof rope rose sail salt sand school shadow sheep shelf shirt shoe silver snow song spoon spring "
    "stone storm street sugar summer table tent tiger tower town train tree tunnel uncle valley vase "
    "violin voice wagon wall water wheel window winter wolf wood wool yard zebra"
)
WORDS = VOCABULARY.split()


class Level(Strict):
    """One difficulty: each kind of data set has its own settings."""

    name: Slug


class Graded(Dataset):
    """A task by level, easiest first."""

    reading: ClassVar[str]
    """How an answer is read: a key of `stages.corpus.readings.READINGS`."""
    answer_tokens: ClassVar[int]
    """The longest answer that is generated."""
    columns: ClassVar[tuple[str, ...]] = ("difficulty", "question", "answer", "choices", "gold")

    levels: Annotated[tuple[Level, ...], Field(min_length=1)]
    test: Annotated[int, Field(ge=1)]
    """Test items a level."""
    train: Annotated[int, Field(ge=0)] = 0
    """Training items a level."""
    fewshot: Annotated[int, Field(ge=0)] = 1
    """Few-shot examples a level."""
    seed: Seed

    @property
    def num_examples(self) -> int:
        """How many few-shot examples there are, over all levels."""
        return self.fewshot * len(self.levels)

    @field_validator("levels")
    @classmethod
    def _distinct(cls, levels: tuple[Level, ...]) -> tuple[Level, ...]:
        """Levels of one name would share a score, levels of the same settings their items.

        `all` is the name of the score over all levels.
        """
        for number, level in enumerate(levels):
            if level.name == "all":
                raise ValueError("a level is named all, as is the score over all levels; rename it")
            for other in levels[:number]:
                if level.name == other.name:
                    raise ValueError(f"two levels are named {level.name}")
                if level.model_copy(update={"name": other.name}) == other:
                    raise ValueError(f"{other.name} and {level.name} are the same level")
        return levels

    def drawn(self, level: Any, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Items of a level with their keys, some maybe alike, at most `TRIES`; the same at each call.

        Items of one key are the same question to anyone who knows the task.
        """
        raise NotImplementedError

    def write(self, folder: Path) -> dict[str, Any]:
        """Write `fewshot`, `train` and `test.parquet`: difficulty, question, answer, choices, gold.

        Raises:
            Refusal: a level does not have that many distinct items.
        """
        splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        for number, level in enumerate(self.levels):
            rest = iter(self.items(level, self.fewshot + self.test + self.train, self.seed + number))
            for split in SPLITS:
                splits[split] += [next(rest) for _ in range(getattr(self, split))]
        for split, rows in splits.items():
            pd.DataFrame(rows, columns=list(self.columns)).to_parquet(folder / f"{split}.parquet")
        return {
            "items": {split: len(rows) for split, rows in splits.items()},
            "answer": {"reading": self.reading, "tokens": self.answer_tokens},
        }

    def items(self, level: Level, count: int, seed: int) -> list[dict[str, Any]]:
        """`count` items of a level with distinct keys, in the generator's order.

        Raises:
            Refusal: the level does not have that many.
        """
        found: dict[str, dict[str, Any]] = {}
        for key, made in self.drawn(level, seed) if count else ():
            found.setdefault(key, made)
            if len(found) == count:
                return list(found.values())
        if count:
            raise Refusal(
                f"level {level.name} has {len(found)} distinct items, {count} were asked for; ask for fewer."
            )
        return []


def item(
    difficulty: str, question: str, answer: str, misses: Sequence[str], draw: random.Random
) -> dict[str, Any]:
    """The item as it is asked, with distinct near misses out of `misses`, all of them in a drawn order."""
    choices = [answer, *draw.sample(misses, CHOICES - 1)]
    draw.shuffle(choices)
    return {
        "difficulty": difficulty,
        "question": question,
        "answer": answer,
        "choices": choices,
        "gold": choices.index(answer),
    }
