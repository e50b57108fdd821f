"""Graded bracket closing: what closes the brackets that are still open, innermost first.

The Dyck languages ask for a stack and for no knowledge of the world (2206.04615, `dyck_languages`). A level
fixes how many brackets are open, how many pairs among them are closed already and must be skipped, and how
many kinds of bracket occur. A wrong choice has one bracket of another kind, or two in each other's place, so
that all choices are of one length.
"""

import random
from collections.abc import Iterator
from itertools import combinations
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.corpus.readings import BRACKETS
from stages.sources.graded import items as graded
from stages.sources.graded.items import TRIES, Graded, item


class Level(graded.Level):
    """One difficulty."""

    depth: Annotated[int, Field(ge=1, le=32)]
    """Brackets that are open."""
    closed: Annotated[int, Field(ge=0, le=32)] = 0
    """Pairs that are closed already."""
    kinds: Annotated[int, Field(ge=1, le=len(BRACKETS))] = len(BRACKETS)
    """Kinds of bracket that occur, all of them."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kinds > self.depth + self.closed:
            raise ValueError(
                f"{self.kinds} kinds of bracket cannot occur in {self.depth + self.closed}; lower kinds, or "
                "raise depth or closed"
            )
        return self


class Brackets(Graded):
    """Open brackets to close by level, easiest first."""

    reading: ClassVar[str] = "brackets"
    answer_tokens: ClassVar[int] = 80

    kind: Literal["brackets"]
    levels: Annotated[tuple[Level, ...], Field(min_length=1)]

    def drawn(self, level: Level, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Opening brackets and closed pairs in a drawn order."""
        draw = random.Random(seed)
        for _ in range(TRIES):
            kinds = draw.sample(list(BRACKETS), level.kinds)
            pairs = [False] * level.depth + [True] * level.closed
            draw.shuffle(pairs)
            openers = [draw.choice(kinds) for _ in pairs]
            shown = " ".join(
                f"{one} {BRACKETS[one]}" if pair else one for one, pair in zip(openers, pairs, strict=True)
            )
            closers = [BRACKETS[one] for one, pair in zip(openers, pairs, strict=True) if not pair][::-1]
            made = item(level.name, f"Close {shown} with", " ".join(closers), misses(closers), draw)
            if len(set(openers)) == level.kinds:
                yield shown, made


def misses(closers: list[str]) -> list[str]:
    """Every answer with one bracket of another kind or two unlike ones exchanged, sorted."""
    found = {
        (*closers[:place], other, *closers[place + 1 :])
        for place, right in enumerate(closers)
        for other in BRACKETS.values()
        if other != right
    }
    for one, two in combinations(range(len(closers)), 2):
        swapped = list(closers)
        swapped[one], swapped[two] = closers[two], closers[one]
        found.add(tuple(swapped))
    return [" ".join(each) for each in sorted(found - {tuple(closers)})]
