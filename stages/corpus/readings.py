"""Readings of generated answers, and whether an answer is right.

A graded data set names its reading in `dataset.json`, and evaluation looks it up here. A response is one
line, without the white space around it. A reading that finds nothing gives an empty answer, which counts
as wrong. Where many answers are right, the response is checked against the item's constraints, each with a
checker of its own, as in IFEval (2311.07911): no model judges another.

A constraint is a kind and its argument, such as `words 4` or `without river`.

Numbers are read by `stages.corpus.written_numbers`.
"""

import re
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any

from stages.corpus.written_numbers import first_number

BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}
"""Each opening bracket and the one that closes it."""


def words(text: str) -> list[str]:
    """Return the runs of letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def _number(response: str) -> str:
    """Return the first number, in one notation: an integer or a reduced fraction."""
    number = first_number(response)
    return "" if number is None else str(number)


def _word(response: str) -> str:
    """Return the first word, in lower case."""
    return " ".join(words(response)[:1])


def _words(response: str) -> str:
    """Return all words, in lower case; what separates them does not count."""
    return " ".join(words(response))


def _brackets(response: str) -> str:
    """Return the brackets at the beginning; spaces do not count."""
    kinds = {*BRACKETS, *BRACKETS.values()}
    return "".join(takewhile(kinds.__contains__, "".join(response.split())))


READINGS: dict[str, Callable[[str], str]] = {
    "number": _number,
    "word": _word,
    "words": _words,
    "brackets": _brackets,
    "constraints": str.strip,
}


def read_answer(reading: str, response: str) -> str:
    """Return the answer that one of `READINGS` finds in a response, empty if there is none."""
    return READINGS[reading](response)


def is_right(reading: str, response: str, item: Mapping[str, Any]) -> bool:
    """Tell whether `response` is a right answer to `item`, read by one of `READINGS`.

    Of a list of words, only as many count as the answer has, since the task does not test where to stop.
    """
    response = read_answer(reading, response)
    if reading == "constraints":
        return bool(words(response)) and all(satisfies(response, each) for each in item["constraints"])
    answer = read_answer(reading, item["answer"])
    if reading == "words":
        response = " ".join(response.split()[: len(answer.split())])
    return response != "" and response == answer


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
"""The checker of each kind of constraint, called with a text and the constraint's argument."""


def satisfies(text: str, constraint: str) -> bool:
    """Tell whether a text satisfies one constraint, such as `words 4`."""
    kind, _, argument = constraint.partition(" ")
    return CHECKERS[kind](text, argument)
