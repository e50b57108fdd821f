"""What a generated answer is read as, and whether it is right.

A graded data set says in its `dataset.json` how its answers are read; evaluation looks the reading up here.
A response is one line, without what surrounds it. What a reading does not find is no answer, and no answer
is never right. A free answer, of which there are many right ones, is held against the item's constraints,
each with a checker of its own, in the way of IFEval (2311.07911): no model judges another.

A constraint is a word and what it is about, such as `words 4` or `without river`.
"""

import re
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any

BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}
"""What opens, and what closes it."""


def words(text: str) -> list[str]:
    """Its runs of letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def _number(response: str) -> str:
    """The first number."""
    found = re.search(r"-?\d+", response)
    return found[0] if found else ""


def _word(response: str) -> str:
    """The first word, in lower case."""
    return " ".join(words(response)[:1])


def _words(response: str) -> str:
    """All words, in lower case; what stands between them does not count."""
    return " ".join(words(response))


def _brackets(response: str) -> str:
    """The brackets it begins with; spaces do not count."""
    kinds = {*BRACKETS, *BRACKETS.values()}
    return "".join(takewhile(kinds.__contains__, "".join(response.split())))


READINGS: dict[str, Callable[[str], str]] = {
    "number": _number,
    "word": _word,
    "words": _words,
    "brackets": _brackets,
    "constraints": str.strip,
}


def read(reading: str, response: str) -> str:
    """What a response is read as by one of `READINGS`; nothing where it does not answer."""
    return READINGS[reading](response)


def right(reading: str, response: str, item: Mapping[str, Any]) -> bool:
    """Whether `response` is a right answer to `item`, by one of `READINGS`.

    Of words as many count as the answer has: where to stop is not what was asked.
    """
    found = read(reading, response)
    if reading == "constraints":
        return bool(words(found)) and all(satisfies(found, one) for one in item["constraints"])
    answer = read(reading, item["answer"])
    if reading == "words":
        found = " ".join(found.split()[: len(answer.split())])
    return found != "" and found == answer


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


CHECKERS: dict[str, Callable[[str, str], bool]] = {
    "words": lambda text, number: len(words(text)) == int(number),
    "starts": lambda text, letter: text.lower().startswith(letter),
    "ends": lambda text, letter: text.lower().rstrip(".!").endswith(letter),
    "with": lambda text, word: word in words(text),
    "without": lambda text, word: word not in words(text),
    "case": lambda text, case: text == {"upper": text.upper(), "title": text.title()}[case],
    "list": lambda text, number: len(_list(text)) == int(number) and all(map(words, _list(text))),
}
"""By the word a constraint begins with: is the text so?"""


def satisfies(text: str, constraint: str) -> bool:
    """Whether a text satisfies one constraint, such as `words 4`."""
    kind, _, about = constraint.partition(" ")
    return CHECKERS[kind](text, about)
