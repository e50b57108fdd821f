"""The settings of training: budgets, and the learning rate of each step."""

import math

import pytest
from pydantic import ValidationError

from tests.tuned import recipe


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.1), (7, 0.0), (48, 0.1), (40, 1.0), (30, 0.5)])
def test_the_rate_rises_in_the_warmup_and_falls_by_the_schedule(schedule, steps, warmup):
    chosen = recipe("full", steps=steps, warmup=warmup, schedule=schedule, learning_rate=3.0)
    rates = [chosen.rate(step, steps) for step in range(steps)]
    rising = max(1, int(steps * warmup))
    for step, rate in enumerate(rates):
        gone = (step - rising + 1) / (steps - rising + 1)
        falling = {"linear": 1 - gone, "cosine": 0.5 + 0.5 * math.cos(math.pi * gone), "constant": 1.0}
        assert rate == pytest.approx(3.0 * (min(1, (step + 1) / rising) if gone <= 0 else falling[schedule]))
    assert max(rates) == rates[rising - 1] == 3.0 and min(rates) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 500}, "steps and tokens are both set; set one of the two"),
        ({"steps": None}, "neither steps nor tokens is set; set one of the two"),
        ({"evaluate_at": (0, 9)}, "evaluate_at names step 9, but there are 8 steps; lower it"),
    ],
)
def test_the_budget_is_set_once_and_covers_every_evaluation(settings, message):
    with pytest.raises(ValidationError, match=message):
        recipe("full", **settings)
