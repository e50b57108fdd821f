"""The benchmark of orchestration: its stages run outside DVC, and every tool gets its figures."""

import json
import subprocess
import sys

import pytest

from benchmarks.orchestration import FIXED
from tests import project


@pytest.mark.drill
def test_stages_run_by_themselves_and_every_tool_has_figures():
    size = FIXED + 2
    command = [sys.executable, "-m", "benchmarks.orchestration", "--sizes", str(size), "--cold", "0"]
    done = subprocess.run(command, cwd=project.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    named = {figure["figure"]: figure["value"] for figure in figures}
    for tool in ("dvc repro", "prunequant run"):
        assert 0 < named[f"{size} stages, {tool}, no-op, CPU seconds"] < 30
