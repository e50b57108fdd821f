"""Sections of params.yaml that have no entries may be left out: for us, for DVC, and for an experiment."""

import json

import pytest
from dvc.parsing import ResolveError
from dvc.repo import Repo

from stages.job.load import load
from stages.job.params import Params
from tests import finished as sweep
from tests import project

OPTIONAL = [name for name, field in Params.model_fields.items() if not field.is_required()]


def without(section, inputs):
    """Params of the small sweep without a section and all that needs it."""
    values = sweep.params(inputs)
    del values[section]
    values["profile"] = {"candidates": []}
    values["evaluate"]["candidates"] = ["base/tiny"]
    for stage in ("quantize", "finetune"):
        recipes = values.get(stage, {}).items()
        if stage in values:
            values[stage] = {key: one for key, one in recipes if one["source"].split("/")[0] != section}
    return values


def test_every_section_of_entries_is_optional():
    assert OPTIONAL == ["prune", "quantize", "teach", "finetune", "noise", "floor", "report", "studies"]


def test_dvc_reads_params_without_a_section(tmp_path, inputs, monkeypatch):
    folder = project.make(tmp_path / "project", inputs)
    monkeypatch.chdir(folder)
    for section in OPTIONAL:
        project.write(folder, without(section, inputs))
        assert section not in (folder / "params.yaml").read_text().split(":\n")
        assert "base/tiny" in load().evaluate.candidates
        with Repo() as repo:
            names = {stage.addressing for stage in repo.index.stages}
            assert {"report", "tidy", "model@tiny"} <= names
            assert not [name for name in names if name.startswith(f"{section}@")]
    values = without("studies", inputs)
    project.write(folder, {key: value for key, value in values.items() if key not in OPTIONAL})
    assert load().recipes() == {}
    with Repo() as repo:
        assert "report" in repo.status()


def test_dvc_has_no_default_for_a_list(tmp_path, inputs, monkeypatch):
    """So `profile` is no optional section, and its absence is answered with the line to write."""
    folder = project.make(tmp_path / "project", inputs)
    monkeypatch.chdir(folder)
    values = sweep.params(inputs)
    del values["profile"]
    project.write(folder, values)
    with Repo() as repo, pytest.raises(ResolveError, match=r"Could not find 'profile\.candidates'"):
        repo.index.stages  # noqa: B018
    graph = (folder / "dvc.yaml").read_text()
    (folder / "dvc.yaml").write_text(graph.replace("vars:", "vars:\n  - profile: {candidates: []}"))
    project.write(folder, sweep.params(inputs))
    with Repo() as repo, pytest.raises(ResolveError, match=r"cannot redefine 'profile\.candidates'"):
        repo.index.stages  # noqa: B018


def test_a_profile_of_candidates_is_explicit(tmp_path, inputs):
    values = sweep.params(inputs)
    values["profile"] = {"candidates": ["base/tiny"], "threads": 1}
    project.write(tmp_path, values)
    with pytest.raises(Exception, match="profile has candidates, so it needs batch_sizes, prompt_tokens"):
        load(tmp_path / "params.yaml")


@pytest.mark.drill
@pytest.mark.parametrize("section", OPTIONAL)
def test_experiments_run_without_a_section(section, copy, inputs):
    project.write(copy, without(section, inputs))
    assert "report" in json.loads(project.run(copy, "dvc", "status", "--json").stdout)
    project.run(copy, "dvc", "repro", "--dry")
    sweep.repro(copy)
    project.commit(copy, "without a section")
    project.run(copy, "dvc", "exp", "run", "-S", "suites.graded.arithmetic.batch_size=1")
    assert project.read(copy)["suites"]["graded"]["arithmetic"]["batch_size"] == 1
    assert sweep.status(copy) == set()
