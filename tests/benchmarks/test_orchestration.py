"""The benchmark of orchestration: its stages run outside DVC, and every tool gets its figures."""

import json

import pytest

from benchmarks import orchestration


@pytest.mark.drill
def test_stages_run_by_themselves_and_every_tool_has_figures(monkeypatch, capsys):
    size = orchestration.FIXED + 2
    monkeypatch.setattr("sys.argv", ["orchestration", "--sizes", str(size), "--cold", "0"])
    orchestration.main()
    figures = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    named = {figure["figure"]: figure["value"] for figure in figures}
    for tool in ("dvc repro", "prunequant run"):
        assert 0 < named[f"{size} stages, {tool}, no-op, CPU seconds"] < 30
