"""Numbers in words, written as digits: `twenty-seven` is 27.

Words that are numbers also have other uses: `there are two ways`, `no one knows`. So a word is read where it
calculates, beside an operator or a result (`two plus 3`, `5 + 7 is twelve`), and elsewhere only in a text
without digits. `one` alone is read where it calculates or ends a sentence (`the answer is one.`). Fractions
and decimals in words (`two thirds`, `two point five`) are not read.
"""

from __future__ import annotations

import re

_SMALL = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_VALUES = {
    **{word: value for value, word in enumerate(_SMALL)},
    **{word: 10 * value for value, word in enumerate(_TENS, 2)},
}

_BELOW_100 = (
    rf"(?:(?:{'|'.join(_TENS)})(?:[-\s](?:{'|'.join(_SMALL[1:10])}))?|(?:{'|'.join(reversed(_SMALL))}))"
)
_BELOW_1000 = rf"(?:(?:{'|'.join(reversed(_SMALL[1:]))})\shundred(?:\s(?:and\s)?{_BELOW_100})?|{_BELOW_100})"
_SPELLED = rf"\b{_BELOW_1000}(?:\s(?:{'|'.join(_SCALES)})(?:\s(?:and\s)?{_BELOW_1000})?)*\b"
_NUMBER = rf"(?:[-+$(]{{0,3}}\d|{_SPELLED})"
_WORD = re.compile(
    rf"(?<![\w-])(?<!point )(?<!hundred and )(?<!thousand and )(?<!million and )(?<!billion and ){_SPELLED}"
    r"(?![-\w]|\sand\sa\s|\s(?:point|hal(?:f|ves)|thirds?|quarters?|\w+ths?)\b)",
    re.IGNORECASE,
)

GIVES = (
    r"(?:,?\s+(?:together|altogether|combined)|,)?\s+(?:(?:will|would)\s+)?"
    r"(?:is|are|be|equals?|makes?|gives?|leaves?|totals?|(?:adds?\sup|sums?\sup|sums?|comes?)\sto)\s+"
)
"""A verb between a calculation and its result."""
_JOINT = (
    r"(?:\s*[+×*÷/=]\s*|\s-\s|\s+(?:plus|minus|times|(?:divided|multiplied)\sby|added\sto|more\sthan|less\sthan"
    rf"|take\saway|and|from|to|by|with)\s+|{GIVES})"
)
_BEFORE = re.compile(rf"(?:(?:\d\)?|{_SPELLED})(?:\s[^\W\d_]{{1,20}})?|\bx){_JOINT}\Z", re.IGNORECASE)
_AFTER = re.compile(rf"(?:\s[^\W\d_]{{1,20}})?{_JOINT}{_NUMBER}", re.IGNORECASE)
_BESIDE = 60
"""Characters before a word that are looked at."""
_LAST = re.compile(r"(?:\A|\b(?:is|equals|answer)|[:=])\s*\Z", re.IGNORECASE)

_END = re.compile(r"\s*(?:[.!\n]|\Z)")


def digits(text: str) -> str:
    """Write the numbers that words give as digits."""
    text = _WORD.sub(lambda word: _value(word[0]) if _calculates(word) else word[0], text)
    if re.search(r"\d", text):
        return text
    return _WORD.sub(lambda word: _value(word[0]) if _counts(word) else word[0], text)


def _calculates(word: re.Match[str]) -> bool:
    """Tell whether a number word is an operand or a result."""
    text, start = word.string, word.start()
    before = _BEFORE.search(text, max(0, start - _BESIDE), start)
    return bool(before or _AFTER.match(text, word.end()))


def _counts(word: re.Match[str]) -> bool:
    """Tell whether a number word counts; `one` must end its sentence as an answer does."""
    if word[0].lower() != "one":
        return True
    return bool(
        _END.match(word.string, word.end())
        and _LAST.search(word.string, max(0, word.start() - _BESIDE), word.start())
    )


def _value(words: str) -> str:
    """Return the digits of a number in words."""
    total = part = 0
    for word in re.findall(r"[a-z]+", words.lower()):
        if word in _SCALES:
            total, part = total + part * _SCALES[word], 0
        elif word == "hundred":
            part *= 100
        elif word != "and":
            part += _VALUES[word]
    return str(total + part)
