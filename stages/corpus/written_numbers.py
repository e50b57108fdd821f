r"""The number that a written answer gives, as people write numbers.

The first number counts, whatever words, units or currencies are around it:

- `12,000`, `12'000` and `12_000` are grouped in threes; `12.5`, `.5`, `12.` and `1.2e3` are decimal; `1/2`,
  `1 1/2` and `½` are fractions; `12k` and `12 thousand` are 12,000. `12.0` equals `12`.
- A minus touches its number, as a hyphen, U+2212 or a dash, or is the word minus or negative.
- Of a calculation the result counts: `5 + 7 = 12` is 12. A calculation without a result is passed over, so
  `5 plus 7 is 12` is 12 too.
- The last `\boxed{}` comes before all other text, as in mathematics.

A number that could be read in two ways is none, so it is never right by luck: `12,5`, `1.2.3`, `2:30`. Nor is
a range, such as `3-4`, or a word, such as `twelve`. A plain space separates numbers, because damaged models
repeat them: `100 100` is 100.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_LONGEST = 100
"""A number with more characters than this is none."""
_SIGNS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d", "-"))
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_WORDS = {"plus": "+", "minus": "-", "negative": "-", "times": "×"}
_WORD = re.compile(rf"\b({'|'.join(_WORDS)})\s+(?=[-+.\d])", re.IGNORECASE)
_LATEX = {r"\times": "×", r"\cdot": "×", r"\div": "÷", "{,}": ",", r"\,": "\u2009"}
_SCALES = {"k": 3, "hundred": 2, "thousand": 3, "million": 6, "billion": 9}

_SPACERS = ",'’_\u00a0\u2009\u202f"
"""Between groups of three digits; the last three are spaces that do not break a line."""
_GROUPED = re.compile(rf"[1-9]\d{{0,2}}([{_SPACERS}])\d{{3}}(?:\1\d{{3}})*(?:\.\d+)?")
_DECIMAL = re.compile(r"\d*\.?\d+")
_DIGITS = rf"(?:(?<!\.)\.)?\d(?:[\d.:{_SPACERS}]*\d)?"
_PARTS = (
    rf"(?<![^\W_])(?P<sign>[-+]?)(?P<digits>{_DIGITS})(?:e(?P<exponent>[-+]?\d{{1,3}}))?"
    rf"(?:\s?[×x*]\s?10\^(?P<power>-?\d{{1,3}}))?(?:\s(?P<part>\d+)(?=/))?(?:/(?P<parts>{_DIGITS}))?"
    rf"(?:\s?(?P<scale>{'|'.join(_SCALES)})\b)?(?![^\W\d_]*\d)"
)
_NUMBER = re.sub(r"\?P<\w+>", "?:", _PARTS)
_SIDE = rf"{_NUMBER}(?:\s*[-+*×x÷/^]\s*{_NUMBER})*"
_CALCULATION = re.compile(rf"{_SIDE}(?:\s*=+\s*{_SIDE})*", re.IGNORECASE)


def first_number(text: str) -> Fraction | None:
    """Return the first number in `text`, or None."""
    for calculation in _CALCULATION.finditer(_plain(text)):
        sides = [side.strip() for side in calculation[0].split("=")]
        numbers = [side for side in sides if re.fullmatch(_NUMBER, side, re.IGNORECASE)]
        if numbers:
            return _value(numbers[0] if numbers[0] == sides[0] else numbers[-1])
    return None


def _plain(text: str) -> str:
    """Write signs, words, fractions and powers in one way, without the markup around numbers."""
    text = text.translate(_SIGNS)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda raised: "^" + raised[0].translate(_RAISED), text)
    text = "".join(map(_fraction, text))
    for written, plain in _LATEX.items():
        text = text.replace(written, plain)
    text = re.sub(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"\^\{(-?\d+)\}", r"^\1", text)
    text = re.sub(r"(?<=\d)\*\*(?=\d)", "^", text)
    text = re.sub(r"(?<!\d)\*\*|\*\*(?!\d)|[$€£¥`]", "", text)
    text = _WORD.sub(lambda word: _WORDS[word[1].lower()], text)
    boxes: list[str] = re.findall(r"\\boxed\s*\{([^{}]*)\}", text)
    return boxes[-1] if boxes else text


def _fraction(character: str) -> str:
    """Return ` 1/2` for `½`; other characters as they are."""
    if not unicodedata.decomposition(character).startswith("<fraction>"):
        return character
    return " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/")


def _value(number: str) -> Fraction | None:
    """Return the value of a text that `_NUMBER` matches; None if it could be read in two ways."""
    written = re.fullmatch(_PARTS, number, re.IGNORECASE)
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
    power += _SCALES[written["scale"].lower()] if written["scale"] else 0
    return (-1 if written["sign"] == "-" else 1) * value * Fraction(10) ** power


def _digits(run: str) -> Fraction | None:
    """Return the value of digits that are grouped in threes, decimal, or plain."""
    if len(run) > _LONGEST:
        return None
    if _GROUPED.fullmatch(run):
        return Fraction(re.sub(f"[{_SPACERS}]", "", run))
    return Fraction(run) if _DECIMAL.fullmatch(run) else None
