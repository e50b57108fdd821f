"""The layout of params.yaml: DVC's editor changes the value that is set and nothing else."""

from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML

from flows import expand
from flows.expand import Chosen, expanded_text
from flows.layout import relaid, section_lines
from stages.job.load import parsed
from tests import project

FILES = [project.ROOT / "params.yaml", *sorted((project.ROOT / "sweeps").glob("*.yaml"))]
STUDIES = sorted(path.stem for path in (project.ROOT / "studies").glob("*.yaml"))


def check_edited(file: Path) -> None:
    """Set a value as `dvc exp run -S` does; assert that one line has changed."""
    before = file.read_text()
    seed = parsed(before)["run"]["seed"]
    apply_overrides(file, ["run.seed=12345"])
    assert file.read_text() == before.replace(f"seed: {seed}", "seed: 12345", 1)
    assert parsed(file.read_text()) == YAML(typ="safe").load(file.read_text()), "DVC reads what we read"


@pytest.mark.parametrize("source", FILES, ids=lambda path: path.name)
def test_dvcs_editor_keeps_the_files_we_ship(source, tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text(source.read_text())
    check_edited(file)
    assert relaid(YAML().load(source.read_text())) == source.read_text(), "`check --fix` keeps it too"


@pytest.mark.drill
@pytest.mark.parametrize("profile", ["laptop", "paper"])
@pytest.mark.parametrize("name", STUDIES)
def test_dvcs_editor_keeps_expanded_studies(name, profile, tmp_path, monkeypatch):
    monkeypatch.chdir(project.ROOT)
    monkeypatch.setattr(expand, "commit_of", lambda *_: "0" * 40)
    file = tmp_path / "params.yaml"
    file.write_text(expanded_text([Chosen(name, profile, None)], {}))
    check_edited(file)


def test_fields_that_end_with_a_list_are_not_last():
    section = {"margin": 0.02, "reference": None, "noise": {"w": ["a/b", "a/c"], "v": ["a/d"]}}
    lines = list(section_lines("report", section, {}))
    assert lines[-1].lstrip().startswith("reference:") and lines[1] == "  margin: 0.02"


def test_a_list_is_never_the_last_field_and_has_lines():
    section = {"a": {"source": "base/b", "steps": [1, 2], "rows": [{"name": "x" * 60, "size": 1}]}}
    assert list(section_lines("finetune", section, {})) == [
        "finetune:",
        "  a:",
        "    steps:",
        "    - 1",
        "    - 2",
        "    rows:",
        f"    - name: {'x' * 60}",
        "      size: 1",
        "    source: base/b",
    ]


def test_long_entries_and_colons_get_lines():
    recipe = {"source": "base/a", "method": "wanda", "sparsity": 0.5, "calibration": {"dataset": "none"}}
    section = {
        "short": {"source": "base/a"},
        "long": recipe | {"structure": "2:4"},
        "hub": {"source": "hub:a/b@c"},
    }
    assert list(section_lines("prune", section, {("prune", "hub"): "of the hub"})) == [
        "prune:",
        "  short: {source: base/a}",
        "  long:",
        "    source: base/a",
        "    method: wanda",
        "    sparsity: 0.5",
        "    calibration: {dataset: none}",
        "    structure: 2:4",
        "  # of the hub",
        "  hub:",
        "    source: hub:a/b@c",
    ]


@pytest.mark.drill
def test_an_experiment_runs_and_leaves_the_layout(finished, tmp_path):
    from tests import finished as sweep

    folder = sweep.copy(finished, tmp_path / "project")
    text = relaid(YAML().load((folder / "params.yaml").read_text()))
    (folder / "params.yaml").write_text(text)
    sweep.repro(folder)
    project.commit(folder, "in our layout")
    project.run(folder, "dvc", "exp", "run", "-S", "prune.wanda-50.sparsity=0.6")
    assert (folder / "params.yaml").read_text() == text.replace(
        "method: wanda\n    sparsity: 0.5", "method: wanda\n    sparsity: 0.6"
    )
