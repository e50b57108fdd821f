"""The input widths that params.yaml declares are compared with the models' own before anything runs."""

import json
from pathlib import Path

import pytest

from stages.core.errors import Refusal
from stages.core.files import RECORD
from stages.job.checks.widths import WIDTHS, of_widths
from stages.job.load import checked_params, load_verified
from tests import families, project
from tests.hub import COMMIT


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    project.write_inputs(tmp_path / "inputs")
    return project.params(tmp_path / "inputs")


def refused(raw) -> str:
    project.write(Path(), raw)
    with pytest.raises(Refusal) as refusal:
        load_verified(widths=True)
    return str(refusal.value)


@pytest.mark.parametrize("declared", [[32, 96], [32], [32, 64, 128]])
def test_widths_that_are_not_the_models_are_refused(raw, declared):
    assert list(of_widths(checked_params(raw))) == []
    raw["models"]["tiny"]["in_features"] = declared
    said = refused(raw)
    assert f"models.tiny.in_features is {declared}, but the model has [32, 64]" in said
    assert "write in_features: [32, 64]" in said


def test_the_model_is_built_once_a_config(raw, monkeypatch):
    params = checked_params(raw)
    assert list(of_widths(params)) == [] and len(json.loads(WIDTHS.read_text())) == 1
    monkeypatch.setattr("stages.model.skeleton.skeleton", None)
    assert list(of_widths(params)) == []


def test_a_downloaded_copy_has_the_config_of_a_model_from_elsewhere(raw):
    checked_params(raw).models["tiny"].download("tiny", checked_params(raw).run)
    raw["models"]["tiny"] |= {"source": f"hub:org/tiny@{COMMIT}", "in_features": [32]}
    assert list(of_widths(checked_params(raw))) == [], "the copy is of another source"
    file = Path("data/models/base/tiny") / RECORD
    record = json.loads(file.read_text())
    record["base"]["source"] = f"hub:org/tiny@{COMMIT}"
    file.write_text(json.dumps(record))
    (mistake,) = of_widths(checked_params(raw))
    assert "the model has [32, 64]" in mistake


def test_a_config_that_cannot_be_built_is_told_in_a_sentence(raw):
    file = Path("inputs/tiny/config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "no-such-family"}))
    (mistake,) = of_widths(checked_params(raw))
    assert mistake.startswith("models.tiny: the config in ") and "no-such-family" in mistake


@pytest.mark.parametrize("family", families.ALL)
def test_every_family_has_the_widths_that_its_stage_finds(family, raw):
    families.save(family, Path("inputs") / family)
    raw["models"]["tiny"] |= {
        "source": f"path:inputs/{family}", "in_features": list(families.IN_FEATURES[family]),
    }  # fmt: skip
    assert list(of_widths(checked_params(raw))) == []
