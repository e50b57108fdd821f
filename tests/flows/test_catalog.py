"""The lists of what params.yaml may name and of what it names."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from flows import catalog
from flows.cli import app
from stages.core.errors import Refusal
from stages.core.files import MODELS
from stages.job.load import checked_params
from stages.job.params import REGISTRY, SUITES
from tests import project


def test_every_method_has_a_line_from_its_docstring():
    rows = catalog.known_methods()
    assert len(rows) == sum(map(len, REGISTRY.values())) + len(SUITES)
    assert all(row["does"].endswith(".") and "\n" not in row["does"] for row in rows)
    wanda = next(row for row in catalog.known_methods("prune") if row["name"] == "wanda")
    assert wanda["does"].startswith("Zero the share `sparsity` of each output row")
    with pytest.raises(Refusal, match="section 'pruning' has no methods; did you mean 'prune'"):
        catalog.known_methods("pruning")


def test_all_that_params_name_is_listed_with_whether_it_exists(workspace, inputs):
    raw = project.params(inputs)
    (workspace / "params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    (MODELS / "prune/wanda-50").mkdir(parents=True)
    rows = {row["name"]: row for row in catalog.listed(checked_params(raw))}
    named = {
        f"{section}/{name}" for section in ("prune", "quantize", "finetune", "noise") for name in raw[section]
    }
    named |= {"base/tiny", "datasets/news", "datasets/speeches", "datasets/arithmetic"}
    assert set(rows) == named | {"suites/news", "suites/arithmetic"}
    assert {name for name, row in rows.items() if row["exists"]} == {"prune/wanda-50"}
    assert rows["prune/wanda-50"]["method"] == "wanda" and rows["prune/wanda-50"]["source"] == "base/tiny"
    shown = CliRunner().invoke(app, ["list", "--json"])
    assert shown.exit_code == 0 and json.loads(shown.output) == list(rows.values())
    assert "wanda-50-gptq-w4g32" in CliRunner().invoke(app, ["list"]).output
