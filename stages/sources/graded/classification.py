"""Graded classification without knowledge of the world: the label follows from rules in the question.

Each rule labels a thing with an unrelated word. The label asked for is in one rule, or at the end of a chain
of rules, which stand in a drawn order. A level fixes the number of chains and of rules per chain. A wrong
choice is the label of another chain, so each choice occurs equally often in the question. `options` sets the
number of choices; chance then differs from level to level, and a generated answer is not affected.
"""

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.sources.graded.items import CHOICES, MAX_DRAWS, NOUNS, STEPS, GradedData, Level, choice_item


class ClassificationLevel(Level):
    """Rule sets of one size."""

    chains: Annotated[int, Field(ge=CHOICES, le=16)]
    """Things to label; no two have the same label."""
    rules: Annotated[int, Field(ge=1, le=4)] = 1
    """Rules from a thing to its label."""
    options: Annotated[int, Field(ge=2, le=16)] | None = None
    """Choices per item. Levels that differ in it ask the same items; null is four, on items of their own."""

    @model_validator(mode="after")
    def _enough_chains(self) -> Self:
        if self.options and self.options > self.chains:
            raise ValueError(
                f"{self.options} options cannot be labels of {self.chains} chains; lower options or raise "
                "chains"
            )
        return self

    def asked(self) -> Level:
        """Return the level without its presentation, in which the number of options is the least."""
        return super().asked().model_copy(update={"options": self.options and 2})

    def domain(self) -> Level:
        """Return the level without options: the same rules with other choices are the same item."""
        return super().asked().model_copy(update={"options": None})


class Classification(GradedData):
    """Things to label in levels, easiest first."""

    reading: ClassVar[str] = "word"
    answer_tokens: ClassVar[int] = 8
    columns: ClassVar[tuple[str, ...]] = (*GradedData.columns, STEPS)

    kind: Literal["classification"]
    levels: Annotated[tuple[ClassificationLevel, ...], Field(min_length=1)]

    def draw_items(self, level: ClassificationLevel, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield chains of rules, with the start of one chain to label."""
        draw = random.Random(seed)
        for _ in range(MAX_DRAWS):
            names = draw.sample(NOUNS, level.chains * (level.rules + 1))
            chains = [names[start :: level.chains] for start in range(level.chains)]
            rules = [f"{thing} is {label}" for chain in chains for thing, label in pairwise(chain)]
            chosen, *others = draw.sample(chains, len(chains))
            draw.shuffle(rules)
            question = f"{', '.join(rules)}, so {chosen[0]} is"
            # The same rules in another order are the same item.
            key = f"{sorted(rules)} {chosen[0]}"
            labels = [chain[-1] for chain in others]
            if level.options:  # drawn apart, so that the next item does not depend on their number
                apart, count = random.Random(key), level.options
                item = choice_item(level.name, question, chosen[-1], labels, apart, count)
            else:
                item = choice_item(level.name, question, chosen[-1], labels, draw)
            yield key, item | {STEPS: ", ".join(f"{thing} is {label}" for thing, label in pairwise(chosen))}
