"""Graded letter counting: count a letter among single letters or in words.

A single letter is a token of its own; letters of a word are hidden in the word's tokens. The words are
reasoning-gym's list. In words the letter occurs 0 to 3 times; among single letters 1, 2, 4 or 8 times, which
a small model can tell apart. These counts are the choices and are equally frequent, so always answering the
same number is guessing.
"""

import random
from collections.abc import Iterator
from string import ascii_lowercase
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.sources.graded.items import CHOICES, MAX_DRAWS, GradedData, Level, choice_item

_COUNTS_IN_WORDS = (0, 1, 2, 3)
_COUNTS_ALONE = (1, 2, 4, 8)


class LettersLevel(Level):
    """Letters to count in texts of one size; give one of `others` and `length`."""

    others: Annotated[int, Field(ge=0, le=16)] | None = None
    """Other letters, all different, among the single letters to count."""
    length: Annotated[int, Field(ge=4, le=10)] | None = None
    """Letters per word."""
    words: Annotated[int, Field(ge=1, le=16)] = 1

    @model_validator(mode="after")
    def _alone_or_in_words(self) -> Self:
        if (self.others is None) == (self.length is None):
            raise ValueError("letters are counted alone or in words; give either others or length")
        if self.words > 1 and self.length is None:
            raise ValueError(f"{self.words} words need a length; others is for single letters")
        return self


class Letters(GradedData):
    """Letters to count in levels, easiest first."""

    reading: ClassVar[str] = "number"
    answer_tokens: ClassVar[int] = 12

    kind: Literal["letters"]
    levels: Annotated[tuple[LettersLevel, ...], Field(min_length=1)]

    def draw_items(self, level: LettersLevel, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield items in groups of four, one of each count."""
        draw = random.Random(seed)
        vocabulary = _words_of_length(level.length) if level.length else []
        possible = _COUNTS_IN_WORDS if vocabulary else _COUNTS_ALONE
        seen: set[str] = set()
        counts, group = draw.sample(possible, CHOICES), list[tuple[str, dict[str, Any]]]()
        for _ in range(MAX_DRAWS):
            count = counts[len(group)]
            if vocabulary:
                parts = draw.sample(vocabulary, level.words)
                letters = [letter for letter in ascii_lowercase if " ".join(parts).count(letter) == count]
                letter = draw.choice(letters) if letters else ""
            else:
                letter, *others = draw.sample(ascii_lowercase, 1 + (level.others or 0))
                parts = [letter] * count + others
                draw.shuffle(parts)
            # The same words or letters in another order are the same item.
            key = f"{letter} in {' '.join(sorted(parts))}"
            if not letter or key in seen:
                continue
            seen.add(key)
            wrong = [str(other) for other in possible if other != count]
            question = f"How often is {letter} in {' '.join(parts)}?"
            group.append((key, choice_item(level.name, question, str(count), wrong, draw)))
            if len(group) == CHOICES:
                yield from group
                counts, group = draw.sample(possible, CHOICES), list[tuple[str, dict[str, Any]]]()


def _words_of_length(length: int) -> list[str]:
    """Return reasoning-gym's words of `length` letters, sorted."""
    from reasoning_gym.data import read_data_file

    words = {word.lower() for word in read_data_file("words3to10.txt").split()}
    return sorted(word for word in words if len(word) == length and {*word} <= {*ascii_lowercase})
