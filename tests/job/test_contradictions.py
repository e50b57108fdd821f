"""Names that contradict settings, and names that do not."""

from pathlib import Path

import pytest

from stages.job.checks.contradictions import contradictions
from stages.job.load import checked_params
from tests import project

NONE, NEWS = {"dataset": "none"}, {"dataset": "news"}
RTN = {"method": "rtn", "bits": 4, "group_size": 32, "calibration": NONE}


@pytest.mark.parametrize(
    ("name", "section", "recipe", "field"),
    [
        ("wanda-60", "prune", {"method": "wanda", "sparsity": 0.5, "calibration": NEWS}, "sparsity"),
        ("wanda-50-two", "prune", {"method": "wanda", "sparsity": 0.5, "calibration": NEWS}, None),
        ("wanda-625", "prune", {"method": "wanda", "sparsity": 0.625, "calibration": NEWS}, None),
        ("half", "prune", {"method": "wanda", "sparsity": 0.6, "calibration": NEWS}, None),
        ("wanda-2of4", "prune",
         {"method": "wanda", "sparsity": 0.5, "structure": "4:8", "calibration": NEWS}, "structure"),
        ("depth-2", "prune", {"method": "depth", "blocks": 1, "metric": "reverse", "calibration": NONE},
         "blocks"),
        ("rtn-w4g32", "quantize", RTN | {"bits": 3}, "bits"),
        ("rtn-w4g64", "quantize", RTN, "group_size"),
        ("wanda-70-rtn-w4", "quantize", RTN, None),
    ],
)  # fmt: skip
def test_only_what_contradicts_is_named(name, section, recipe, field, inputs):
    raw = project.params(inputs) | {"prune": {}, "quantize": {}, "finetune": {}}
    raw[section] = {name: {"source": "base/tiny", **recipe}}
    raw["evaluate"] = {"candidates": ["base/tiny"]}
    found = list(contradictions(checked_params(raw)))
    assert [line.split(", but its ")[1].split(" is ")[0] for line in found] == ([field] if field else [])
    assert all(line.startswith(f"{section}.{name}: its name says ") for line in found)


def test_no_file_that_we_ship_contradicts_itself(monkeypatch):
    from stages.job.load import load

    monkeypatch.chdir(project.ROOT)
    for file in ("params.yaml", "sweeps/methods.yaml", "sweeps/recovery.yaml", "sweeps/graded.yaml"):
        assert not list(contradictions(load(Path(file))))
