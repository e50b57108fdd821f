"""Graded instructions: write a line that satisfies constraints which code can check, by how many there are.

As in IFEval (2311.07911), a response is judged by programs, one a constraint; here no constraint asks for
knowledge, and difficulty is their number. A response is drawn first and the constraints are read off it, so
that they never contradict each other; it is the example answer. There are other right ones, and generation
counts them all. A wrong choice violates one constraint of the item and satisfies the others.
"""

import random
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.corpus.readings import satisfies
from stages.sources.graded import items as graded
from stages.sources.graded.items import CHOICES, TRIES, WORDS, Graded, item

SAID = {
    "words": "exactly {} words",
    "list": "exactly {} things, with commas between them",
    "starts": "the first letter is {}",
    "ends": "the last letter is {}",
    "with": "with the word {}",
    "without": "without the word {}",
    "case": "all in {} case",
}
"""How each kind of constraint is asked for, in the order they are asked in."""


class Level(graded.Level):
    """One difficulty."""

    constraints: Annotated[int, Field(ge=1, le=6)]
    """How many at once."""


class Instructions(Graded):
    """Instructions to follow by level, easiest first."""

    reading: ClassVar[str] = "constraints"
    answer_tokens: ClassVar[int] = 48
    columns: ClassVar[tuple[str, ...]] = (*Graded.columns, "constraints")

    kind: Literal["instructions"]
    levels: Annotated[tuple[Level, ...], Field(min_length=1)]

    def drawn(self, level: Level, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Responses with constraints that they satisfy."""
        draw = random.Random(seed)
        for _ in range(TRIES):
            kinds = _kinds(level.constraints, draw)
            words = draw.sample(WORDS, draw.randint(3, 8))
            separator = ", " if "list" in kinds else " "
            response = separator.join(words)
            case = draw.choice(["upper", "title"]) if "case" in kinds else "lower"
            about = {
                "words": str(len(words)),
                "list": str(len(words)),
                "starts": response[0],
                "ends": response[-1],
                "with": draw.choice(words[1:-1]),
                "without": draw.choice([word for word in WORDS if word not in words]),
                "case": case,
            }
            constraints = [f"{kind} {about[kind]}" for kind in SAID if kind in kinds]
            question = f"Write {'; '.join(SAID[kind].format(about[kind]) for kind in SAID if kind in kinds)}:"
            answer = getattr(response, case)()
            wrong = misses(answer, separator, constraints, draw)
            yield question, item(level.name, question, answer, wrong, draw) | {"constraints": constraints}


def _kinds(count: int, draw: random.Random) -> set[str]:
    """Kinds of constraint, all alike likely, that go together.

    What any line of words would satisfy never stands alone, and the length is asked for in one way at most.
    """
    while True:
        kinds = set(draw.sample(list(SAID), count))
        if kinds != {"without"} and not {"words", "list"} <= kinds:
            return kinds


def misses(answer: str, separator: str, constraints: list[str], draw: random.Random) -> list[str]:
    """Three or more distinct edits of `answer`, each violating one of `constraints`, evenly over these."""
    words = answer.split(separator)
    cased = str.upper if answer.isupper() else str.title if answer.istitle() else str.lower
    found: dict[str, None] = {}
    while len(found) < CHOICES - 1:
        for constraint in draw.sample(constraints, len(constraints)):
            edited = list(words)
            place = draw.randrange(len(words))
            match constraint.split():
                case ["words" | "list", _]:
                    edited[place : place + 1] = [] if draw.random() < 0.5 else [edited[place], _other(draw)]
                case ["starts", _]:
                    edited[0] = _other(draw)
                case ["ends", _]:
                    edited[-1] = _other(draw)
                case ["with", word]:
                    edited = [_other(draw) if one.lower() == word else one for one in edited]
                case ["without", word]:
                    edited[place] = word
            text = separator.join(map(cased, edited))
            if constraint.startswith("case"):
                edited[place] = edited[place].lower()
                text = separator.join(edited)
            if [one for one in constraints if not satisfies(text, one)] == [constraint]:
                found[text] = None
    return list(found)


def _other(draw: random.Random) -> str:
    return draw.choice(WORDS)
