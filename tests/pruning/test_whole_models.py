"""What all pruning methods that load the whole source have in common."""

from typing import Any

import pytest

from stages.core.errors import Refusal
from tests import families
from tests.pipeline import NONE, TEXT, do, params, prune

METHODS: dict[str, dict[str, Any]] = {
    "heads": {"importance": "magnitude", "remove": 0.5},
    "width": {"importance": "ppm", "remove": 0.5},
    "depth": {"metric": "reverse", "blocks": 1},
    "stepwise": {
        "sparsity": 0.5, "max_rise": 0.5, "held_out": 1, "policy": {"kind": "rules"}, "calibration": TEXT,
    },
    "resp": {
        "sparsity": 0.5, "steps": 2, "scope": "row",
        "calibration": TEXT | {"tokens": "generated", "seed": 0, "temperature": 1.0, "prompt_length": 4},
    },
    "resp-structures": {
        "sparsity": 0.5, "steps": 2,
        "calibration": TEXT | {"tokens": "generated", "seed": 0, "temperature": 1.0, "prompt_length": 4},
    },
}  # fmt: skip
"""Methods that load the whole source."""


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("method", METHODS)
def test_values_outside_the_linears_that_are_not_finite_are_refused_by_name(
    method, name, workspace, monkeypatch
):
    recipe = {"source": "base/tiny", "method": method, "calibration": NONE} | METHODS[method]
    chosen = params("llama", {f"prune/{method}": recipe})
    do(chosen, [])
    broken = families.model("llama")
    broken.get_parameter(name).data[0] = float("nan")
    monkeypatch.setattr("stages.model.source.load_model", lambda *_, **__: broken)
    with pytest.raises(Refusal, match=f"^base/tiny: NaN or infinite values in {name}; nothing was written"):
        prune(chosen, method)
