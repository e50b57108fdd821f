"""Settings of thinking that make no sense are refused."""

import pytest
from pydantic import ValidationError

from stages.evaluation.thinking.settings import Thinking
from tests.thinking import RULES


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"budgets": (8, 4)}, "each budget once, the smallest first"),
        ({"budgets": (4, 4)}, "each budget once"),
        ({"budgets": (-1,)}, "greater than or equal to 0"),
        ({"draws": 2, "temperature": 0.0}, "2 draws at temperature 0 are identical"),
        ({"end": ""}, "at least 1 character"),
    ],
)
def test_settings_that_make_no_sense_are_refused(rules, message):
    with pytest.raises(ValidationError, match=message):
        Thinking(**RULES | {"budgets": (0, 3)} | rules)
