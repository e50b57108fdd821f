"""The little project, for tests of what reads finished ones."""

import pytest

from tests.flows import little


@pytest.fixture(scope="module")
def little_project(tmp_path_factory):
    """The little project; read it, do not write to it."""
    return little.make(tmp_path_factory.mktemp("little") / "project")


@pytest.fixture
def in_little(little_project, monkeypatch):
    """The little project, to be in."""
    monkeypatch.chdir(little_project)
    return little_project
