"""The JSON Schema that editors use: current, true of the files we ship, and strict."""

import json

import jsonschema
import pytest
import yaml

from stages.job.editors import json_schema
from stages.job.load import parsed
from tests import project

FILES = [project.ROOT / "params.yaml", *sorted((project.ROOT / "sweeps").glob("*.yaml"))]
VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def test_the_committed_schema_is_current():
    committed = json.loads((project.ROOT / "docs/params.schema.json").read_text())
    assert committed == json_schema(), "run `prunequant schema > docs/params.schema.json`"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_files_we_ship_fit(file):
    assert not list(VALIDATOR.iter_errors(parsed(file.read_text())))


@pytest.mark.parametrize(
    ("old", "new"),
    [("sparsity: 0.5", "sparcity: 0.5"), ("sparsity: 0.5", "sparsity: 1.5"),
     ("method: wanda", "method: wander"), ("dtype: bfloat16", "dtype: bf16"), ("prune:", "prone:")],
)  # fmt: skip
def test_a_mistake_is_marked(old, new):
    text = (project.ROOT / "params.yaml").read_text()
    assert old in text
    assert list(VALIDATOR.iter_errors(yaml.safe_load(text.replace(old, new, 1))))
