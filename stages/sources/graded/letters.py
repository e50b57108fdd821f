"""Graded letter counting: how often a letter occurs, in letters that stand alone or in words.

Letters that stand alone are a token each; those of words are hidden in the words' tokens. The words are
reasoning-gym's list. In words the letter occurs never to three times; alone 1, 2, 4 or 8 times, which a small
model can tell apart. Each is as frequent as the others, and these are the choices, so that to say one number
always is to guess.
"""

import random
from collections.abc import Iterator
from string import ascii_lowercase
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.sources.graded import items as graded
from stages.sources.graded.items import CHOICES, TRIES, Graded, item

IN_WORDS = (0, 1, 2, 3)
ALONE = (1, 2, 4, 8)
"""How often a letter occurs, in either case."""


class Level(graded.Level):
    """One difficulty."""

    others: Annotated[int, Field(ge=0, le=16)] | None = None
    """Other letters, each another one, that stand among those to count; no words then."""
    length: Annotated[int, Field(ge=4, le=10)] | None = None
    """Letters of a word."""
    words: Annotated[int, Field(ge=1, le=16)] = 1

    @model_validator(mode="after")
    def _alone_or_in_words(self) -> Self:
        if (self.others is None) == (self.length is None):
            raise ValueError("letters are counted alone or in words; give one of others and length")
        if self.words > 1 and self.length is None:
            raise ValueError(f"{self.words} words need a length; others is of letters that stand alone")
        return self


class Letters(Graded):
    """Words whose letters are counted by level, easiest first."""

    reading: ClassVar[str] = "number"
    answer_tokens: ClassVar[int] = 12

    kind: Literal["letters"]
    levels: Annotated[tuple[Level, ...], Field(min_length=1)]

    def drawn(self, level: Level, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Four items at a time, one of each count."""
        draw = random.Random(seed)
        known = _known(level.length) if level.length else []
        possible = IN_WORDS if known else ALONE
        seen: set[str] = set()
        counts, four = draw.sample(possible, CHOICES), list[tuple[str, dict[str, Any]]]()
        for _ in range(TRIES):
            count = counts[len(four)]
            if known:
                parts = draw.sample(known, level.words)
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
            four.append((key, item(level.name, question, str(count), wrong, draw)))
            if len(four) == CHOICES:
                yield from four
                counts, four = draw.sample(possible, CHOICES), list[tuple[str, dict[str, Any]]]()


def _known(length: int) -> list[str]:
    """reasoning-gym's words of that many letters, sorted."""
    from reasoning_gym.data import read_data_file

    listed = {word.lower() for word in read_data_file("words3to10.txt").split()}
    return sorted(word for word in listed if len(word) == length and {*word} <= {*ascii_lowercase})
