"""The report of the default sweep over made-up results, written once a session."""

from pathlib import Path

import pytest

from stages.job.params import Params
from tests import results
from tests.pipeline import report

HOSTILE = "<script src='http://example.org/x.js'>alert(1)</script>"
"""An answer that a page must escape."""


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, Path]:
    """The params and the folder of the project; read it, do not write to it."""
    folder, wanted = tmp_path_factory.mktemp("whole"), results.params()
    results.write(folder / "data/results", wanted, response=HOSTILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        report(wanted, "all")
    return wanted, folder
