"""Graded word sorting from reasoning-gym: words in alphabetical order, by how many and how alike they are.

A level fixes the number of words and how many letters two of them begin with alike at most. A wrong choice
has two neighbours of the right order exchanged, or one word moved by two places: the words are the same.
Two words have one wrong order; there a choice may also say one of them twice.
"""

import random
from collections.abc import Iterator
from itertools import pairwise, takewhile
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.sources.graded import items as graded
from stages.sources.graded.items import TRIES, Graded, item

LONGEST = 7
"""Letters of a word."""


class Level(graded.Level):
    """One difficulty."""

    words: Annotated[int, Field(ge=2, le=8)]
    shared: Annotated[int, Field(ge=0, le=3)] = 0
    """Letters that the two most alike words begin with alike."""


class Sorting(Graded):
    """Words to sort by level, easiest first."""

    reading: ClassVar[str] = "words"
    answer_tokens: ClassVar[int] = 40

    kind: Literal["sorting"]
    levels: Annotated[tuple[Level, ...], Field(min_length=1)]

    def drawn(self, level: Level, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """reasoning-gym's words to sort, those that the level does not describe left out."""
        import reasoning_gym
        from reasoning_gym.algorithmic.word_sorting import TextTransformation

        stream = reasoning_gym.create_dataset(
            "word_sorting",
            min_words=level.words,
            max_words=level.words,
            min_word_length=3,
            max_word_length=LONGEST,
            transformation=TextTransformation.LOWERCASE,
            seed=seed * TRIES,
            size=TRIES,
        )
        for entry in stream:
            words = entry["metadata"]["transformed_words"]
            if not all(word.isalpha() and word.isascii() for word in words) or shared(words) != level.shared:
                continue
            # The same words in another order are the same item.
            ordered = sorted(words)
            draw = random.Random(" ".join(words))
            question = f"Sort {', '.join(words)}:"
            yield " ".join(ordered), item(level.name, question, ", ".join(ordered), misses(ordered), draw)


def shared(words: list[str]) -> int:
    """How many letters the two most alike of them begin with alike; of alike words, all their letters."""
    return max(
        sum(1 for _ in takewhile(lambda letters: letters[0] == letters[1], zip(*pair, strict=False)))
        for pair in pairwise(sorted(words))
    )


def misses(ordered: list[str]) -> list[str]:
    """The orders next to the right one: two neighbours exchanged, or one word moved by two places.

    Of two words also each of them twice.
    """
    found = [f"{word}, {word}" for word in ordered] if len(ordered) == 2 else []
    for start in range(len(ordered) - 1):
        for turned in ((1, 0), (1, 2, 0), (2, 0, 1)):
            if start + len(turned) <= len(ordered):
                moved = [ordered[start + place] for place in turned]
                found.append(", ".join([*ordered[:start], *moved, *ordered[start + len(turned) :]]))
    return found
