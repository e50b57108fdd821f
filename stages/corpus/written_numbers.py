r"""The number that a written answer gives, as people write numbers.

The first number counts, whatever words, units or currencies are around it:

- `12,000`, `12'000` and `12_000` are grouped in threes; `12.5`, `.5`, `12.` and `1.2e3` are decimal; `1/2`,
  `1 1/2` and `½` are fractions; `12k` and `12 thousand` are 12,000, `1.2M` is 1,200,000. `12.0` equals `12`.
- A minus touches its number, as a hyphen, U+2212 or a dash, or is the word minus or negative. A space may
  follow it where it can only be a sign: behind `=`, `≈`, an arrow, an operator, `is` or `equals` on the same
  line, and first in a box. `-(12)` is -12.
- Of a calculation the result counts: `2(5 + 7) = 24` is 24. A calculation without a result is passed over,
  so `5 plus 7 is 12` and `the sum of 5 and 7 is 12` are 12 too. So is an equation to solve: `2x = 14`.
- Verbs give results as well, with units or without: `27 and 15 make 42`, `5 km plus 7 km comes to 12 km`.
- Numbers in words count where they calculate and where there are no digits (`stages.corpus.number_words`).
- The number of a step is passed over: `Step 1: 7 + 5 = 12`, and a first `1.` with another number behind it.
- The last `\boxed{}` comes before all other text, as in mathematics.

A number that could be read in two ways is none, so it is never right by luck: `12,5`, `1.2.3`, `2:30`. Nor is
a range, such as `3-4`. A plain space separates numbers, because damaged models
repeat them: `100 100` is 100.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from fractions import Fraction

from stages.corpus.number_words import GIVES, digits

_LONGEST = 100
"""A number with more characters than this is none."""
_SIGNS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d", "-"))
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_WORDS = {"plus": "+", "minus": "-", "negative": "-", "times": "×"}
_WORD = re.compile(rf"\b({'|'.join(_WORDS)})\s+(?=[-+.\d])", re.IGNORECASE)
_LATEX = {
    r"\times": "×", r"\cdot": "×", r"\div": "÷", r"\left(": "(", r"\right)": ")", "{,}": ",", r"\,": "\u2009",
}  # fmt: skip
_SCALES = {"k": 3, "hundred": 2, "thousand": 3, "million": 6, "billion": 9, "m": 6, "b": 9}

_SPACERS = ",'’_\u00a0\u2009\u202f"
"""Between groups of three digits; the last three are spaces that do not break a line."""
_GROUPED = re.compile(rf"[1-9]\d{{0,2}}([{_SPACERS}])\d{{3}}(?:\1\d{{3}})*(?:\.\d+)?")
_DECIMAL = re.compile(r"\d*\.?\d+")
_DIGITS = rf"(?:(?<!\.)\.)?\d(?:[\d.:{_SPACERS}]*\d)?"
_PARTS = (
    rf"(?<![^\W_])(?P<sign>[-+]?)(?P<digits>{_DIGITS})(?:e(?P<exponent>[-+]?\d{{1,3}}))?"
    rf"(?:\s?[×x*]\s?10\^(?P<power>-?\d{{1,3}}))?(?:(?:\s(?P<part>\d+))?/(?P<parts>{_DIGITS}))?"
    rf"(?P<scale>\s?(?:{'|'.join(scale for scale in _SCALES if scale not in 'mb')})\b"
    r"|(?:(?<=\.\d)|(?<=\.\d\d))(?-i:[MB])\b)?"
    r"(?![^\W\d_]*\d)"
)
_NUMBER = re.compile(_PARTS, re.IGNORECASE)

_DEEPEST = 8
"""Parentheses within each other that are read."""
_START = re.compile(r"[-+.\d(|√]|\b[^\W\d_]")
_OPEN, _CLOSE = re.compile(r"[-+]?\(\s*|\|(?=\S)"), re.compile(r"\s*\)")
_BAR = re.compile(r"\|")
_ROOT = re.compile(r"[-+]?√\s?")
_CALL = re.compile(r"[^\W\d_]+\(\s*")
_OF_ONE = re.compile(
    r"\b(?:half|double|square|cube|(?:square|cube) root|absolute value) of (?:the number )?", re.IGNORECASE
)
_OF_SEVERAL = re.compile(
    r"\b(?:(?:sum|product|difference|quotient|remainder|total|average|mean)\s(?:of|between|when)"
    r"|add(?:ing)?|multiply(?:ing)?|subtract(?:ing)?|divid(?:e|ing))\s(?:the numbers? )?",
    re.IGNORECASE,
)
_SPOKEN = (
    r"\b(?:plus|minus|times|mod|modulo|to the power of|(?:is )?(?:divided|multiplied) by|added to|more than"
    r"|less than|take away)\b"
)
_OPERATOR = re.compile(rf"\s*(?:[-+*×x÷/^·⋅]|(?<=\s)%(?=\s)|{_SPOKEN})\s*", re.IGNORECASE)
_OPERATOR_OF_RESULTS = re.compile(r"\s+(?:less|over|from|into)\s+", re.IGNORECASE)
"""Words that calculate if a result follows; `12 over 5 days` is 12."""
_AND = re.compile(r"\s*(?:,\s+and|,|\b(?:and|by|from|to|with)\b)\s*", re.IGNORECASE)
_POWER = re.compile(r"\s(?:squared|cubed)\b|!(?=\s*=)", re.IGNORECASE)
_GIVES = re.compile(rf"{GIVES}(?=[-+.\d(])", re.IGNORECASE)
_SUM = re.compile(r"\s*,?\s+and\s+|\s*,\s+(?=(?:[^\s,]+,\s+){0,8}[^\s,]+,?\s+and\s)", re.IGNORECASE)
_UNIT = re.compile(
    r"(?:%|°\w?|\s?(?!(?:[xyz]|and|is|are|plus|minus|times)\b)[^\W\d_]{1,20})"
    rf"(?=\s*[-+*×÷/=]|\s+{_SPOKEN}|\s*,?\s+and\s|{GIVES})",
    re.IGNORECASE,
)
_UNKNOWNS = ("x", "y", "z")
_UNKNOWN = re.compile(r"[xyz](?![^\W_])", re.IGNORECASE)
_FACTOR = re.compile(r"\s?[xyz](?=\s*[-+*×÷/^=])", re.IGNORECASE)
_EQUALS = re.compile(r"\s*=+\s*")
_SIGN = re.compile(r"((?:[-=]>|[=≈≃→⇒]|\d[ \t]*[-+*×÷/][ \t])[ \t]*-)[ \t]+(?=[.\d(])")
_SIGN_OF_WORDS = re.compile(r"(\b(?:is|equals?)[ \t]+[-\u2212])[ \t]+(?=[.\d(])", re.IGNORECASE)
"""A minus that can only be a sign, behind words if it is no dash."""
_STEP = re.compile(
    r"^[ \t]*step[ \t]+\d+[ \t]*[:.)][ \t]*(?=\S)|\A\s*1[.)][ \t]+(?=[^\n]*\d)", re.IGNORECASE | re.MULTILINE
)
"""The number of a step, at the begin of its line."""


def first_number(text: str) -> Fraction | None:
    """Return the first number in `text`, or None."""
    text = _plain(text)
    loose, strict, at = _Reader(text, loose=True), _Reader(text, loose=False), 0
    while start := _START.search(text, at):
        sides = loose.equation(start.start())
        if len(sides) == 1:  # no result follows
            sides = strict.equation(start.start())
        if result := _result(sides):
            return _value(result)
        at = sides[-1].end if sides else start.start() + 1
    return None


@dataclass(frozen=True)
class _Side:
    """A side of an equation, or a part of it."""

    end: int
    """Where it ends in the text."""
    alone: str = ""
    """The number or the unknown, if it is nothing else."""
    unsolved: bool = False
    """Whether it calculates with an unknown."""

    @classmethod
    def of(cls, end: int, *parts: _Side) -> _Side:
        """Return the calculation with these parts."""
        return cls(end, unsolved=any(part.unsolved or part.alone.lower() in _UNKNOWNS for part in parts))


class _Reader:
    """Finds the ends of calculations.

    Args:
        loose: read `2(5 + 7)`, `max(3, 5)`, `2x` and `5 apples` as parts of a calculation as well. They are
            if an equals sign follows, otherwise `12(3)` is 12.
    """

    def __init__(self, text: str, *, loose: bool) -> None:
        self._text, self._loose = text, loose

    def equation(self, at: int) -> list[_Side]:
        """Return the sides of the equation that begins here; none if there is no number."""
        sides: list[_Side] = []
        added = self._side(at, joint=_SUM) if self._loose else None
        if added and not added.alone and (gives := _GIVES.match(self._text, added.end)):
            sides, at = [added], gives.end()  # `27 and 15 make 42`
        while side := self._side(at):
            sides.append(side)
            equals = _EQUALS.match(self._text, side.end)
            if equals is None:
                break
            at = equals.end()
        return sides

    def _side(self, at: int, depth: int = 0, *, joint: re.Pattern[str] | None = None) -> _Side | None:
        """Read operands with operators between them; what `joint` matches counts as one."""
        side = self._operand(at, depth)
        while side:
            operator = _OPERATOR.match(self._text, side.end)
            if operator is None and self._loose:
                operator = _OPERATOR_OF_RESULTS.match(self._text, side.end)
            if operator and not self._loose and "\n" in operator[0]:
                break  # the next line of a list
            if operator is None and joint:
                operator = joint.match(self._text, side.end)
            operand = self._operand(operator.end(), depth) if operator else None
            if operand is None and self._loose and (factor := _FACTOR.match(self._text, side.end)):
                operand = _Side(factor.end(), factor[0].strip())
            if operand is None:
                break
            side = _Side.of(operand.end, side, operand)
        return side

    def _operand(self, at: int, depth: int) -> _Side | None:
        """Read what is between two operators, with powers and units behind it."""
        if depth > _DEEPEST:
            return None
        operand = self._inside(at, depth)
        while operand and self._loose and self._text.startswith("(", operand.end):
            factor = self._inside(operand.end, depth)
            if factor is None:
                break
            operand = _Side.of(factor.end, operand, factor)
        if operand and (power := _POWER.match(self._text, operand.end)):
            operand = _Side.of(power.end(), operand)
        if operand and self._loose and (unit := _UNIT.match(self._text, operand.end)):
            operand = replace(operand, end=unit.end())
        return operand

    def _inside(self, at: int, depth: int) -> _Side | None:
        """Read a number, an unknown, or what a parenthesis, a function or words apply to."""
        text = self._text
        if written := _NUMBER.match(text, at):
            return _Side(written.end(), written[0])
        if words := _OF_SEVERAL.match(text, at):
            side = self._side(words.end(), depth + 1, joint=_AND)
            return side if side and not side.alone else None
        if words := _OF_ONE.match(text, at) or _ROOT.match(text, at):
            side = self._operand(words.end(), depth + 1)
            return side and _Side.of(side.end, side)
        if opening := _OPEN.match(text, at):
            return self._enclosed(opening, depth)
        if not self._loose:
            return None
        if call := _CALL.match(text, at):
            return self._enclosed(call, depth)
        unknown = _UNKNOWN.match(text, at)
        return _Side(unknown.end(), unknown[0]) if unknown else None

    def _enclosed(self, opening: re.Match[str], depth: int) -> _Side | None:
        """Read what is between parentheses or bars, the first of which is given."""
        kind = opening[0].strip()
        side = self._side(opening.end(), depth + 1, joint=_AND if len(kind) > 1 else None)
        if side is None:
            return None
        closing = (_BAR if kind == "|" else _CLOSE).match(self._text, side.end)
        if closing is None:
            return None
        if side.alone and kind[-1] in "(|" and len(kind) == 1 + (kind[0] in "-+"):
            bare = side.alone.lstrip("-+")
            negative = kind != "|" and side.alone.startswith("-") != kind.startswith("-")
            return _Side(closing.end(), "-" * negative + bare)
        return _Side.of(closing.end(), side)


def _result(sides: list[_Side]) -> str:
    """Return the result of an equation, the number that a side of it is; empty if there is none.

    `12 = 5 + 7` begins with it, all others end with it.
    """
    numbers = [side.alone for side in sides if side.alone and side.alone.lower() not in _UNKNOWNS]
    if not numbers or any(side.unsolved for side in sides):
        return ""
    return numbers[0] if numbers[0] == sides[0].alone and _DECIMAL.fullmatch(numbers[0]) else numbers[-1]


def _plain(text: str) -> str:
    """Write signs, words, fractions and powers in one way, without the markup around numbers."""
    text = _SIGN_OF_WORDS.sub(r"\1", text).translate(_SIGNS)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda raised: "^" + raised[0].translate(_RAISED), text)
    text = "".join(map(_fraction, text))
    for written, plain in _LATEX.items():
        text = text.replace(written, plain)
    text = re.sub(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"(\1)/(\2)", text)
    text = re.sub(r"\\sqrt\s*\{([^{}]*)\}", r"√(\1)", text)
    text = re.sub(r"\^\{(-?\d+)\}", r"^\1", text)
    text = re.sub(r"(?<=\d)\*\*(?=\d)", "^", text)
    text = re.sub(r"(?<!\d)\*\*|\*\*(?!\d)|[$€£¥`]", "", text)
    text = _STEP.sub("", text)
    boxes: list[str] = re.findall(r"\\boxed\s*\{([^{}]*)\}", text)
    text = digits("=" + boxes[-1] if boxes else text)
    return _WORD.sub(lambda word: _WORDS[word[1].lower()], _SIGN.sub(r"\1", text))


def _fraction(character: str) -> str:
    """Return ` 1/2` for `½`; other characters as they are."""
    if not unicodedata.decomposition(character).startswith("<fraction>"):
        return character
    return " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/")


def _value(number: str) -> Fraction | None:
    """Return the value of a text that `_NUMBER` matches; None if it could be read in two ways."""
    written = _NUMBER.fullmatch(number)
    assert written
    value = _digits(written["digits"])
    below = _digits(written["parts"] or "1")
    above = _digits(written["part"] or "0")
    if value is None or above is None or not below:
        return None
    if written["part"]:
        value += above / below
    else:
        value /= below
    power = int(written["exponent"] or 0) + int(written["power"] or 0)
    power += _SCALES[written["scale"].strip().lower()] if written["scale"] else 0
    return (-1 if written["sign"] == "-" else 1) * value * Fraction(10) ** power


def _digits(run: str) -> Fraction | None:
    """Return the value of digits that are grouped in threes, decimal, or plain."""
    if len(run) > _LONGEST:
        return None
    if _GROUPED.fullmatch(run):
        return Fraction(re.sub(f"[{_SPACERS}]", "", run))
    return Fraction(run) if _DECIMAL.fullmatch(run) else None
