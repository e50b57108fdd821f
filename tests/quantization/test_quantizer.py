"""The settings that quantizers share, held against a model."""

from types import SimpleNamespace

import pytest

from stages.core.errors import Refusal
from stages.quantization.rtn import RTN
from tests import families


@pytest.mark.parametrize(("group_size", "uneven"), [(None, 0), (32, 0), (64, 12), (24, 14)])
def test_a_group_size_must_divide_every_input_width(group_size, uneven):
    recipe = RTN(
        source="base/m", method="rtn", bits=4, group_size=group_size, calibration={"dataset": "none"}
    )
    source = SimpleNamespace(model=families.model("llama"))
    if not uneven:
        assert recipe.plan(source, None) == 14
        return
    message = f"group_size {group_size} does not divide the input width of {uneven} linears: model.layers.0"
    with pytest.raises(Refusal, match=message):
        recipe.plan(source, None)
