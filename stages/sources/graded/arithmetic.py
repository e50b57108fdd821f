"""Graded arithmetic from reasoning-gym: sums and differences, by number of terms and digits.

A level fixes the terms, the digits, the operator, and whether a carry or borrow occurs. A wrong choice is off
by one, two or ten.
"""

import random
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.sources.graded.items import MAX_DRAWS, STEPS, GradedData, Level, choice_item


class ArithmeticLevel(Level):
    """Sums or differences of one size."""

    operator: Literal["+", "-"]
    digits: Annotated[int, Field(ge=1, le=12)]
    terms: Annotated[int, Field(ge=2, le=12)] = 2
    carries: bool
    """Whether some column of digits carries (or borrows)."""


class Arithmetic(GradedData):
    """Sums and differences in levels, easiest first."""

    reading: ClassVar[str] = "number"
    answer_tokens: ClassVar[int] = 12
    columns: ClassVar[tuple[str, ...]] = (*GradedData.columns, STEPS)

    kind: Literal["arithmetic"]
    levels: Annotated[tuple[ArithmeticLevel, ...], Field(min_length=1)]

    def draw_items(self, level: ArithmeticLevel, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield those of reasoning-gym's chain sums that belong to the level."""
        import reasoning_gym

        stream = reasoning_gym.create_dataset(
            "chain_sum",
            min_terms=level.terms,
            max_terms=level.terms,
            min_digits=level.digits,
            max_digits=level.digits,
            seed=seed * MAX_DRAWS,
            size=MAX_DRAWS,
        )
        for entry in stream:
            expression = entry["metadata"]["expression"]
            terms = [int(word) for word in expression.split()[::2]]
            if set(expression.split()[1::2]) != {level.operator} or int(entry["answer"]) < 0:
                continue
            if has_carry(terms, level.operator) == level.carries:
                # 3 + 4 and 4 + 3 count as the same item, and so do 8 - 5 - 3 and 8 - 3 - 5.
                fixed = terms[:1] if level.operator == "-" else []
                key = " ".join(map(str, [*fixed, *sorted(terms[len(fixed) :])]))
                yield key, arithmetic_item(level.name, expression, int(entry["answer"]))


def has_carry(terms: list[int], operator: str) -> bool:
    """Tell whether adding (or subtracting) the terms in order ever carries (or borrows) between digits."""
    total = terms[0]
    for term in terms[1:]:
        left, right = total, term
        while left or right:
            if (left % 10 + right % 10 > 9) if operator == "+" else (left % 10 < right % 10):
                return True
            left, right = left // 10, right // 10
        total = total + term if operator == "+" else total - term
    return False


def arithmetic_item(difficulty: str, expression: str, answer: int) -> dict[str, Any]:
    """Return the item that asks for `expression`; its wrong choices are drawn from the expression alone."""
    draw = random.Random(expression)
    wrong = [str(answer + offset) for offset in (-10, -2, -1, 1, 2, 10) if answer + offset >= 0]
    return choice_item(difficulty, f"{expression} =", str(answer), wrong, draw) | {STEPS: steps(expression)}


def steps(expression: str) -> str:
    """Return the totals on the way, such as `7 + 4 = 11, 11 + 3 = 14` for `7 + 4 + 3`."""
    first, *rest = expression.split()
    total, lines = int(first), []
    for operator, term in zip(rest[::2], map(int, rest[1::2]), strict=True):
        before, total = total, total + term if operator == "+" else total - term
        lines.append(f"{before} {operator} {term} = {total}")
    return ", ".join(lines)
