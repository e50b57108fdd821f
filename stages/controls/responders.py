"""Responders without knowledge, and their answers; a task's floor is the best of their scores.

A score means something only above that floor. The floor is measured on the same items, not assumed: a lone
full stop satisfies an instruction that only forbids commas, the longest choice is right more often than
chance, and equal odds for all choices score 0.46 on TruthfulQA-MC2.

A scorer answers requests for likelihoods, a speaker requests for text; `stages.evaluation.null` asks both.
"""

import random
from collections.abc import Callable

from stages.corpus.readings import words

Speaker = Callable[[str, random.Random], str]
"""(prompt, random draws) -> text."""

SCORERS = ("uniform", "longest-choice")
"""`uniform` gives all choices of an item the same odds, `longest-choice` prefers the longest."""

_LENGTH = 300
"""Words of a long answer."""
_COMMON = (
    "air", "animal", "answer", "book", "boy", "change", "city", "country", "day", "earth", "end", "eye",
    "family", "farm", "father", "field", "fish", "food", "form", "garden", "girl", "ground", "hand", "head",
    "help", "hill", "home", "horse", "house", "idea", "island", "king", "land", "letter", "life", "light",
    "line", "man", "moon", "mother", "mountain", "name", "night", "number", "page", "paper", "part", "people",
    "picture", "place", "plant", "play", "point", "river", "road", "room", "school", "sea", "sentence",
    "side", "sound", "star", "state", "story", "summer", "sun", "table", "thing", "time", "tree", "turn",
    "voice", "water", "way", "wind", "woman", "wood", "word", "world", "year",
)  # fmt: skip


def _shuffled(prompt: str, draw: random.Random) -> str:
    """Say the words of the question, the last line with any, in a random order and without the first.

    Of "Sort b, a:" these are a and b: the responder knows what the task is about, but not how to do it.
    """
    lines = [spoken for line in prompt.split("\n") if (spoken := words(line))]
    mentioned = lines[-1][1:] if lines else []
    return " ".join(draw.sample(mentioned, len(mentioned)))


def _previous(prompt: str, draw: random.Random) -> str:
    """Say the last word of the example before the question: the responder knows what an answer looks like."""
    lines = [line for line in prompt.split("\n") if line.strip()]
    return lines[-2].split()[-1] if len(lines) > 1 else ""


SPEAKERS: dict[str, Speaker] = {
    "empty": lambda prompt, draw: "",
    "dot": lambda prompt, draw: ".",
    "repeat": lambda prompt, draw: " ".join(["the"] * _LENGTH),
    "echo": lambda prompt, draw: prompt.strip(),
    "shuffled": _shuffled,
    "previous": _previous,
    "random-words": lambda prompt, draw: " ".join(draw.choices(_COMMON, k=_LENGTH)),
}
RESPONDERS = (*SCORERS, *SPEAKERS)
