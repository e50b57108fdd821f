"""Numbers as people write them."""

from fractions import Fraction

import pytest

from stages.corpus.written_numbers import first_number

WRITTEN = {
    # plain
    "12": 12, "12.": 12, "12...": 12, "+3": 3, "-3": -3, "−3": -3, "–3": -3, "- 3": 3, "minus 3": -3,
    "Negative 3": -3, "007": 7, "１２": 12, "(12)": 12, "12\n13": 12, "100 100": 100, "1, 2": 1, "7 or 8": 7,
    # grouped in threes
    "12,000": 12000, "1,234,567.5": "2469135/2", "12'000": 12000, "12_000": 12000, "12\u202f000": 12000,
    # decimals, powers, scales
    "12.5": "25/2", "12.0": 12, ".5": "1/2", "-.5": "-1/2", "1.2e3": 1200, "1.2 × 10^3": 1200,
    "1.2x10³": 1200, "12k": 12000, "12 thousand": 12000, "12 kg": 12, "12th": 12, "12-year": 12,
    # fractions
    "1/2": "1/2", "-1/2": "-1/2", "1 1/2": "3/2", "½": "1/2", "1½": "3/2",
    # currencies, markup
    "$12": 12, "-$3": -3, "$-3": -3, "12%": 12, "**12**": 12, "`12`": 12, "_12_": 12,
    r"$\boxed{12{,}000}$": 12000, r"5 and 7 make \boxed{12}": 12, r"\boxed{\text{12}}": 12,
    r"\frac{1}{2}": "1/2", r"1.2 \times 10^{3}": 1200, r"12\,000": 12000,
    # calculations
    "5 + 7 = 12": 12, "5+7=12": 12, "5 − 7 = −2": -2, r"5 \times 7 = 35": 35, "5 x 7 = 35": 35,
    "24/2 = 12": 12, "2**3 = 8": 8, "5 + 7 = 10 + 2 = 12": 12, "12 = 5 + 7": 12, "x = 12": 12,
    "5 + 7 = **12**": 12, "5 plus 7 is 12": 12, "1 + 1 = 2, 2 + 2 = 4": 2, "=> 7!": 7,
    # words around
    "Q1: 12": 12, "No.7": 7, "top-3": 3, "12: yes": 12, "~12": 12,
}  # fmt: skip
UNREAD = [
    "", ".", "twelve", "no idea", "12,5", "1,23,456", "0,500", "1.2.3", "2:30", "3-4", "5 + 7", "5 + 7 = ?",
    "10/11/2020", "1/0", "0x1F", "30D2", "1e999999999", "9" * 5000, r"12 or \boxed{}",
]  # fmt: skip


@pytest.mark.parametrize("text", WRITTEN)
def test_a_written_number_is_read(text):
    assert len(WRITTEN) >= 60
    assert first_number(text) == Fraction(WRITTEN[text])
    assert first_number(f"  {text} ") == Fraction(WRITTEN[text])


@pytest.mark.parametrize("text", UNREAD)
def test_what_can_be_read_in_two_ways_is_no_number(text):
    assert first_number(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1," * 9999 + "x1", None),
        ("5 + " * 2000, None),
        ("5" + " " * 999 + "5", 5),
        ("1" * 4000 + "a1", None),
    ],
    ids=["groups", "a sum", "spaces", "digits"],
)
def test_long_text_is_read(text, number):
    """A pattern that goes back over what it has read would never end on these."""
    assert first_number(text) == number
