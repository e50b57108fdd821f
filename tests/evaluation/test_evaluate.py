"""The evaluation stage: what its rows say of the candidate and of how it was asked."""

import pandas as pd
import pytest

from tests.pipeline import NONE, do, params
from tests.scoring import changed, scored

pytestmark = pytest.mark.device

PRUNED = {"source": "base/tiny", "method": "magnitude", "sparsity": 0.5, "scope": "row", "calibration": NONE}


def test_a_row_says_what_the_candidate_is(workspace):
    chosen = params(
        "llama", {"prune/row-50": PRUNED, "noise/again": {"source": "prune/row-50", "batch_size": 1}}
    )
    do(chosen)
    for candidate in ("prune/row-50", "noise/again"):
        scores, _ = scored(chosen, candidate, "news")
        row = scores.to_dict("records")[0]
        assert row["prune_method"] == "magnitude" and row["sparsity"] == 0.5
        assert row["structure"] == "unstructured" and pd.isna(row["quantize_method"])
        assert row["batch_size"] == (1 if candidate == "noise/again" else 2)
        assert row["device"] == chosen.run.arithmetic()["device"]
        assert row["dtype"] == "bfloat16" and row["threads"] == 1
    assert list(row["lineage"]) == ["base/tiny", "prune/row-50", "noise/again"]
    assert row["source"] == "prune/row-50"


def test_noise_in_another_dtype_is_computed_in_it(workspace):
    chosen = params("llama", {"noise/again": {"source": "base/tiny", "dtype": "float32"}})
    do(chosen)
    values = {}
    for candidate, dtype in (("base/tiny", "bfloat16"), ("noise/again", "float32")):
        scores, _ = scored(chosen, candidate, "news")
        assert (scores["dtype"] == dtype).all()
        values[dtype] = scores["value"].iloc[0]
    in_float32 = changed(chosen, run=chosen.run.model_dump(mode="json") | {"dtype": "float32"}, noise={})
    scores, _ = scored(in_float32, "base/tiny", "news")
    assert scores["value"].iloc[0] == values["float32"] != values["bfloat16"]


def test_noise_after_every_block_is_noise_of_its_source(workspace):
    again = {"source": "base/tiny", "rounding": {"size": 0.1, "seed": 0}}
    chosen = params("llama", {"noise/again": again, "noise/same": again, "noise/other": again})
    other = {"noise": chosen.model_dump(mode="json")["noise"]}
    other["noise"]["other"]["rounding"]["seed"] = 1
    chosen = changed(chosen, **other)
    do(chosen)
    values = {
        name: scored(chosen, name, "news")[0]["value"].iloc[0]
        for name in ("base/tiny", "noise/again", "noise/same", "noise/other")
    }
    assert values["noise/again"] == values["noise/same"]
    assert len(set(values.values())) == 3
