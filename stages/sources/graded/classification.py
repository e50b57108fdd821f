"""Graded classification without knowledge of the world: a label that follows from rules in the question.

Things are labelled with words that have nothing to do with them, a rule each. The label asked for is found in
one rule, or at the end of a chain of rules that stand in a drawn order. A level fixes the chains and
the rules of a chain. A wrong choice is another chain's label, so that each has been read as often.
"""

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.sources.graded import items as graded
from stages.sources.graded.items import CHOICES, TRIES, WORDS, Graded, item


class Level(graded.Level):
    """One difficulty."""

    chains: Annotated[int, Field(ge=CHOICES, le=16)]
    """Things that have a label, each another one."""
    rules: Annotated[int, Field(ge=1, le=4)] = 1
    """Rules from a thing to its label."""


class Classification(Graded):
    """Things to label by level, easiest first."""

    reading: ClassVar[str] = "word"
    answer_tokens: ClassVar[int] = 8

    kind: Literal["classification"]
    levels: Annotated[tuple[Level, ...], Field(min_length=1)]

    def drawn(self, level: Level, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Chains of rules, and the start of one of them to label."""
        draw = random.Random(seed)
        for _ in range(TRIES):
            names = draw.sample(WORDS, level.chains * (level.rules + 1))
            chains = [names[start :: level.chains] for start in range(level.chains)]
            rules = [f"{one} is {other}" for chain in chains for one, other in pairwise(chain)]
            asked, *others = draw.sample(chains, len(chains))
            draw.shuffle(rules)
            question = f"{', '.join(rules)}, so {asked[0]} is"
            # The same rules in another order are the same item.
            key = f"{sorted(rules)} {asked[0]}"
            yield key, item(level.name, question, asked[-1], [chain[-1] for chain in others], draw)
