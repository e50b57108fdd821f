"""The folder in which a tutorial is done."""

import pytest

from tests import project


@pytest.fixture
def values(tmp_path, monkeypatch):
    """Params of a tiny project in an empty folder, which becomes the current one."""
    monkeypatch.chdir(tmp_path)
    project.write_inputs(tmp_path / "inputs")
    return project.params(tmp_path / "inputs")
