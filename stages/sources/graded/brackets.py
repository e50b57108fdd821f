"""Graded bracket closing: close the brackets that are still open, innermost first.

Dyck languages need a stack and no knowledge of the world (2206.04615, `dyck_languages`). A level fixes how
many brackets are open, how many pairs among them are already closed and must be skipped, and how many kinds
of bracket occur. A wrong choice has one bracket of another kind, or two brackets swapped, so all choices have
the same length.
"""

import random
from collections.abc import Iterator
from itertools import combinations
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.corpus.readings import BRACKETS
from stages.sources.graded.items import MAX_DRAWS, GradedData, Level, choice_item


class BracketsLevel(Level):
    """Bracket sequences of one size."""

    depth: Annotated[int, Field(ge=1, le=32)]
    """Open brackets."""
    closed: Annotated[int, Field(ge=0, le=32)] = 0
    """Pairs that are already closed."""
    kinds: Annotated[int, Field(ge=1, le=len(BRACKETS))] = len(BRACKETS)
    """Kinds of bracket; each of them occurs."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kinds > self.depth + self.closed:
            raise ValueError(
                f"{self.kinds} kinds of bracket cannot occur among {self.depth + self.closed} brackets; "
                "lower kinds, or raise depth or closed"
            )
        return self


class Brackets(GradedData):
    """Open brackets to close in levels, easiest first."""

    reading: ClassVar[str] = "brackets"
    answer_tokens: ClassVar[int] = 80

    kind: Literal["brackets"]
    levels: Annotated[tuple[BracketsLevel, ...], Field(min_length=1)]

    def draw_items(self, level: BracketsLevel, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield opening brackets and closed pairs in a drawn order."""
        draw = random.Random(seed)
        for _ in range(MAX_DRAWS):
            kinds = draw.sample(list(BRACKETS), level.kinds)
            closed = [False] * level.depth + [True] * level.closed
            draw.shuffle(closed)
            openers = [draw.choice(kinds) for _ in closed]
            text = " ".join(
                f"{opener} {BRACKETS[opener]}" if pair else opener
                for opener, pair in zip(openers, closed, strict=True)
            )
            closers = [BRACKETS[opener] for opener, pair in zip(openers, closed, strict=True) if not pair][
                ::-1
            ]
            item = choice_item(
                level.name, f"Close {text} with", " ".join(closers), wrong_closers(closers), draw
            )
            if len(set(openers)) == level.kinds:
                yield text, item


def wrong_closers(closers: list[str]) -> list[str]:
    """Return every answer with one bracket of another kind or two different brackets swapped, sorted."""
    wrong = {
        (*closers[:place], other, *closers[place + 1 :])
        for place, right in enumerate(closers)
        for other in BRACKETS.values()
        if other != right
    }
    for first, second in combinations(range(len(closers)), 2):
        swapped = list(closers)
        swapped[first], swapped[second] = closers[second], closers[first]
        wrong.add(tuple(swapped))
    return [" ".join(answer) for answer in sorted(wrong - {tuple(closers)})]
