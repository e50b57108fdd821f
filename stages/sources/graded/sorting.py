"""Graded word sorting from reasoning-gym: words in alphabetical order, by their number and common prefixes.

A level fixes the number of words and the longest prefix that two of them share. A wrong choice has two
neighbours swapped, or one word moved by two places, so it has the same words. Two words have only one wrong
order, so there a choice may also repeat one of them.
"""

import random
from collections.abc import Iterator
from itertools import pairwise, takewhile
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.sources.graded.items import MAX_DRAWS, GradedData, Level, choice_item

_LONGEST_WORD = 7


class SortingLevel(Level):
    """Word lists of one size."""

    words: Annotated[int, Field(ge=2, le=8)]
    shared: Annotated[int, Field(ge=0, le=3)] = 0
    """Letters of the longest prefix that two words share."""


class Sorting(GradedData):
    """Words to sort in levels, easiest first."""

    reading: ClassVar[str] = "words"
    answer_tokens: ClassVar[int] = 40

    kind: Literal["sorting"]
    levels: Annotated[tuple[SortingLevel, ...], Field(min_length=1)]

    def draw_items(self, level: SortingLevel, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield those of reasoning-gym's word lists that belong to the level."""
        import reasoning_gym
        from reasoning_gym.algorithmic.word_sorting import TextTransformation

        stream = reasoning_gym.create_dataset(
            "word_sorting",
            min_words=level.words,
            max_words=level.words,
            min_word_length=3,
            max_word_length=_LONGEST_WORD,
            transformation=TextTransformation.LOWERCASE,
            seed=seed * MAX_DRAWS,
            size=MAX_DRAWS,
        )
        for entry in stream:
            words = entry["metadata"]["transformed_words"]
            plain = all(word.isalpha() and word.isascii() for word in words)
            if not plain or shared_letters(words) != level.shared:
                continue
            # The same words in another order are the same item.
            ordered = sorted(words)
            draw = random.Random(" ".join(words))
            question = f"Sort {', '.join(words)}:"
            item = choice_item(level.name, question, ", ".join(ordered), wrong_orders(ordered), draw)
            yield " ".join(ordered), item


def shared_letters(words: list[str]) -> int:
    """Return the length of the longest prefix that two words share; equal words share all letters."""
    return max(
        sum(1 for _ in takewhile(lambda letters: letters[0] == letters[1], zip(*pair, strict=False)))
        for pair in pairwise(sorted(words))
    )


def wrong_orders(ordered: list[str]) -> list[str]:
    """Return the orders next to the right one: two neighbours swapped, or one word moved by two places.

    For two words, also each of them twice.
    """
    orders = [f"{word}, {word}" for word in ordered] if len(ordered) == 2 else []
    for start in range(len(ordered) - 1):
        for permutation in ((1, 0), (1, 2, 0), (2, 0, 1)):
            if start + len(permutation) <= len(ordered):
                moved = [ordered[start + place] for place in permutation]
                orders.append(", ".join([*ordered[:start], *moved, *ordered[start + len(permutation) :]]))
    return orders
