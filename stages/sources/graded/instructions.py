"""Graded instructions: write a line that satisfies constraints, by the number of constraints.

As in IFEval (2311.07911), programs judge a response, one per constraint; here no constraint needs knowledge
of the world, and difficulty is their number. A response is drawn first and the constraints are read off it,
so they never contradict each other. It is the example answer; other lines satisfy the constraints too, and
generation accepts them all. A wrong choice violates exactly one constraint of the item.
"""

import random
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.corpus.readings import satisfies
from stages.sources.graded.items import CHOICES, MAX_DRAWS, NOUNS, GradedData, Level, choice_item

PHRASES = {
    "words": "exactly {} words",
    "list": "exactly {} things, with commas between them",
    "starts": "the first letter is {}",
    "ends": "the last letter is {}",
    "with": "with the word {}",
    "without": "without the word {}",
    "case": "all in {} case",
}
"""The wording of each kind of constraint, in the order of the question."""


class InstructionsLevel(Level):
    """Instructions with a fixed number of constraints."""

    constraints: Annotated[int, Field(ge=1, le=6)]
    """Constraints per item."""


class Instructions(GradedData):
    """Instructions to follow in levels, easiest first."""

    reading: ClassVar[str] = "constraints"
    answer_tokens: ClassVar[int] = 48
    columns: ClassVar[tuple[str, ...]] = (*GradedData.columns, "constraints")

    kind: Literal["instructions"]
    levels: Annotated[tuple[InstructionsLevel, ...], Field(min_length=1)]

    def draw_items(self, level: InstructionsLevel, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield responses with constraints that they satisfy."""
        draw = random.Random(seed)
        for _ in range(MAX_DRAWS):
            kinds = _draw_kinds(level.constraints, draw)
            words = draw.sample(NOUNS, draw.randint(3, 8))
            separator = ", " if "list" in kinds else " "
            response = separator.join(words)
            case = draw.choice(["upper", "title"]) if "case" in kinds else "lower"
            about = {
                "words": str(len(words)),
                "list": str(len(words)),
                "starts": response[0],
                "ends": response[-1],
                "with": draw.choice(words[1:-1]),
                "without": draw.choice([word for word in NOUNS if word not in words]),
                "case": case,
            }
            ordered = [kind for kind in PHRASES if kind in kinds]
            constraints = [f"{kind} {about[kind]}" for kind in ordered]
            question = f"Write {'; '.join(PHRASES[kind].format(about[kind]) for kind in ordered)}:"
            answer = getattr(response, case)()
            wrong = violating_edits(answer, separator, constraints, draw)
            item = choice_item(level.name, question, answer, wrong, draw)
            yield question, item | {"constraints": constraints}


def _draw_kinds(count: int, draw: random.Random) -> set[str]:
    """Draw kinds of constraint that go together, each equally likely.

    `without` alone is never drawn, as almost any line satisfies it, and the length is constrained only once.
    """
    while True:
        kinds = set(draw.sample(list(PHRASES), count))
        if kinds != {"without"} and not {"words", "list"} <= kinds:
            return kinds


def violating_edits(answer: str, separator: str, constraints: list[str], draw: random.Random) -> list[str]:
    """Return three or more distinct edits of `answer`; each violates one constraint, all equally often."""
    words = answer.split(separator)
    cased = str.upper if answer.isupper() else str.title if answer.istitle() else str.lower
    edits: dict[str, None] = {}
    while len(edits) < CHOICES - 1:
        for constraint in draw.sample(constraints, len(constraints)):
            edited = list(words)
            place = draw.randrange(len(words))
            match constraint.split():
                case ["words" | "list", _]:
                    edited[place : place + 1] = (
                        [] if draw.random() < 0.5 else [edited[place], draw.choice(NOUNS)]
                    )
                case ["starts", _]:
                    edited[0] = draw.choice(NOUNS)
                case ["ends", _]:
                    edited[-1] = draw.choice(NOUNS)
                case ["with", required]:
                    edited = [draw.choice(NOUNS) if word.lower() == required else word for word in edited]
                case ["without", forbidden]:
                    edited[place] = forbidden
            text = separator.join(map(cased, edited))
            if constraint.startswith("case"):
                edited[place] = edited[place].lower()
                text = separator.join(edited)
            if [other for other in constraints if not satisfies(text, other)] == [constraint]:
                edits[text] = None
    return list(edits)
