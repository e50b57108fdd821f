"""The settings that quantizers share, held against a model."""

from types import SimpleNamespace

import pytest

from stages.core.errors import Refusal
from stages.quantization.mxfp4 import MXFP4
from stages.quantization.nvfp4 import NVFP4
from stages.quantization.rtn import RTN
from tests import families

pytestmark = pytest.mark.device


@pytest.mark.parametrize(("group_size", "uneven"), [(None, 0), (32, 0), (64, 12), (24, 14)])
def test_a_group_size_must_divide_every_input_width(group_size, uneven):
    recipe = RTN(
        source="base/m", method="rtn", bits=4, group_size=group_size, calibration={"dataset": "none"}
    )
    source = SimpleNamespace(model=families.model("llama"))
    if not uneven:
        assert recipe.plan(source, None) == 14
        return
    message = (
        f"group_size {group_size} does not divide the input width of {uneven} linears: model.layers.0.*; "
        r"set a divisor of every input width, or null for one scale per row\.$"
    )
    with pytest.raises(Refusal, match=message):
        recipe.plan(source, None)


@pytest.mark.parametrize(("method", "size"), [(MXFP4, 32), (NVFP4, 16)])
def test_a_group_size_that_the_method_fixes_is_not_to_be_set(method, size, monkeypatch):
    recipe = method(source="base/m", method=method.__name__.lower(), calibration={"dataset": "none"})
    monkeypatch.setattr(families.CONFIGS["llama"], "hidden_size", 40)
    message = (
        rf"^group_size {size} does not divide the input width of \d+ linears: .*; this method has no other "
        r"group size; use another method, or list these linears in ignore\.$"
    )
    with pytest.raises(Refusal, match=message):
        recipe.plan(SimpleNamespace(model=families.model("llama")), None)
