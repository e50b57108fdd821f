"""Graded arithmetic from reasoning-gym: sums and differences, by how many terms and digits they have.

A level fixes the terms, the digits, the operator, and whether a carry or borrow occurs. A wrong choice is one
or two off, or one in the tens.
"""

import random
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.sources.graded import items as graded
from stages.sources.graded.items import TRIES, Graded


class Level(graded.Level):
    """One difficulty."""

    operator: Literal["+", "-"]
    digits: Annotated[int, Field(ge=1, le=12)]
    terms: Annotated[int, Field(ge=2, le=12)] = 2
    carries: bool
    """Whether some column of digits carries over (or borrows)."""


class Arithmetic(Graded):
    """Sums and differences by level, easiest first."""

    reading: ClassVar[str] = "number"
    answer_tokens: ClassVar[int] = 12

    kind: Literal["arithmetic"]
    levels: Annotated[tuple[Level, ...], Field(min_length=1)]

    def drawn(self, level: Level, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """reasoning-gym's chain sums, those that the level does not describe left out."""
        import reasoning_gym

        stream = reasoning_gym.create_dataset(
            "chain_sum",
            min_terms=level.terms,
            max_terms=level.terms,
            min_digits=level.digits,
            max_digits=level.digits,
            seed=seed * TRIES,
            size=TRIES,
        )
        for entry in stream:
            expression = entry["metadata"]["expression"]
            terms = [int(word) for word in expression.split()[::2]]
            if set(expression.split()[1::2]) != {level.operator} or int(entry["answer"]) < 0:
                continue
            if carries(terms, level.operator) == level.carries:
                # 3 + 4 and 4 + 3 are one item, and so are 8 - 5 - 3 and 8 - 3 - 5.
                kept = terms[:1] if level.operator == "-" else []
                key = " ".join(map(str, [*kept, *sorted(terms[len(kept) :])]))
                yield key, item(level.name, expression, int(entry["answer"]))


def carries(terms: list[int], operator: str) -> bool:
    """Whether adding (or subtracting) the terms in order ever carries (or borrows) between digits."""
    total = terms[0]
    for term in terms[1:]:
        left, right = total, term
        while left or right:
            if (left % 10 + right % 10 > 9) if operator == "+" else (left % 10 < right % 10):
                return True
            left, right = left // 10, right // 10
        total = total + term if operator == "+" else total - term
    return False


def item(difficulty: str, expression: str, answer: int) -> dict[str, Any]:
    """The item as it is asked, with three distinct near misses; drawn from the expression alone."""
    draw = random.Random(expression)
    misses = [str(answer + offset) for offset in (-10, -2, -1, 1, 2, 10) if answer + offset >= 0]
    return graded.item(difficulty, f"{expression} =", str(answer), misses, draw)
