"""Shares as counts, seeds by name, draws and finiteness."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.core import numbers
from stages.core.errors import Refusal


@given(st.integers(0, 1000), st.integers(0, 10**7))
def test_a_decimal_share_is_counted_exactly(thousandths, total):
    assert numbers.count_of(thousandths / 1000, total) == math.floor(Fraction(thousandths, 1000) * total)


def test_draws_depend_on_their_name_alone():
    first = torch.rand(4, generator=numbers.generator("7 a"))
    assert torch.equal(torch.rand(4, generator=numbers.generator("7 a")), first)
    assert not torch.equal(torch.rand(4, generator=numbers.generator("7 b")), first)
    assert 0 <= numbers.seed_of("x") < 2**56 <= numbers.seed_of("x", 8) + 2**56


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 5.0))
def test_a_token_is_the_first_beyond_the_number(seed, temperature):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 7, generator=draw)
    uniform = torch.rand(3, generator=draw, dtype=torch.float64)
    drawn = numbers.sample(logits, uniform, temperature)
    total = (logits.double() / temperature).softmax(1).cumsum(1)
    for row in range(3):
        beyond = [token for token in range(7) if total[row, token] > uniform[row] * total[row, -1]]
        assert drawn[row].item() == beyond[0]


def test_the_last_token_is_drawn_where_rounding_leaves_none_beyond():
    assert numbers.sample(torch.zeros(1, 3), torch.ones(1, dtype=torch.float64), 1.0).item() == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_values_are_refused_by_name(value):
    tensors = {"good": torch.ones(2), "bad": torch.tensor([0.0, value]), "empty": torch.empty(0)}
    assert numbers.finite(tensors["good"]) and numbers.finite(tensors["empty"])
    assert not numbers.finite(tensors["bad"])
    with pytest.raises(Refusal, match="model: NaN or infinite values in bad; nothing was written"):
        numbers.check_finite("model", tensors.items())


def test_no_gradients_are_recorded():
    weight = torch.ones(2, requires_grad=True)
    doubled = numbers.no_grad(lambda: weight * 2)()
    assert not doubled.requires_grad and torch.is_grad_enabled()


@given(st.lists(st.floats(0, 50), min_size=1, max_size=8))
def test_whole_numbers_add_up(values):
    parts = {str(number): value for number, value in enumerate(values)}
    total = round(sum(values))
    whole = numbers.apportion(parts, total)
    assert sum(whole.values()) == total
    assert all(abs(whole[name] - part) <= 1 for name, part in parts.items())


def test_the_largest_remainders_are_rounded_up():
    assert numbers.apportion({"a": 1.2, "b": 1.5, "c": 1.3}, 4) == {"a": 1, "b": 2, "c": 1}
    assert numbers.apportion({"a": 0.5, "b": 0.5}, 1) == {"a": 1, "b": 0}
