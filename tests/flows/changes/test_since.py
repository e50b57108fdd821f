"""What changed since the last commit, as a section of a copy of the report's page."""

import logging
import shutil
from pathlib import Path

import pytest
import yaml

from flows import scheduled, summary
from flows.changes.asked import compare
from flows.changes.webpage import with_changes
from tests import project

PAGE = '<nav>X <a href="#caveats">Caveats</a></nav><section id="caveats" class="c"></section>'
RAN = [{"stage": "report", "outcome": "ran"}]


@pytest.fixture
def rerun(little_project, tmp_path, monkeypatch):
    """A copy of the little project, to be in, whose quantized model has scores that are not committed."""
    folder = little_project.parent / tmp_path.name  # beside the remote
    shutil.copytree(little_project, folder, symlinks=True)
    monkeypatch.chdir(folder)
    lock = yaml.safe_load(Path("dvc.lock").read_text())
    reported(lock, "before")
    Path("dvc.lock").write_text(yaml.safe_dump(lock))
    project.commit(folder, "a run")
    lock["stages"]["graded@quantize/q"]["outs"][0]["md5"] = _scores_of(lock, "prune/w")
    reported(lock, "after")
    Path("dvc.lock").write_text(yaml.safe_dump(lock))
    return folder


def reported(lock: dict, md5: str) -> None:
    lock["stages"]["report"] = {"outs": [{"path": "data/report", "md5": f"{md5}.dir", "size": 1}]}
    Path("data/report").mkdir(parents=True, exist_ok=True)
    Path("data/report/index.html").write_text(PAGE)


def _scores_of(lock: dict, candidate: str) -> str:
    return lock["stages"][f"graded@{candidate}"]["outs"][0]["md5"]


def test_a_run_writes_the_report_with_what_changed(rerun, capsys):
    summary.show_changes(RAN)
    page = rerun / "data/runs/since-HEAD.html"
    assert str(page) in capsys.readouterr().out.replace("\n", "")
    text = page.read_text()
    assert text.index('href="#since">Since HEAD<') < text.index('href="#caveats"')
    assert text.index('<section id="since"') < text.index("Artifacts") < text.index('<section id="caveats"')
    assert "quantize/q" in text and "HEAD was commit " in text
    assert (rerun / "data/report/index.html").read_text() == PAGE, "the report is its inputs' alone"


def test_what_the_cache_lacks_is_told_on_the_page(rerun):
    last = yaml.safe_load(project.run(rerun, "git", "show", "HEAD:dvc.lock").stdout)
    md5 = _scores_of(last, "quantize/q")
    Path(".dvc/cache/files/md5", md5[:2], md5[2:]).unlink()
    summary.show_changes(RAN)
    assert "prunequant diff HEAD --fetch results" in (rerun / "data/runs/since-HEAD.html").read_text()


def test_a_run_that_made_no_other_report_writes_nothing(rerun, capsys):
    summary.show_changes([{"stage": "report", "outcome": "unchanged"}])
    lock = yaml.safe_load(Path("dvc.lock").read_text())
    reported(lock, "before")
    Path("dvc.lock").write_text(yaml.safe_dump(lock))
    summary.show_changes(RAN)
    shutil.rmtree(".git")
    summary.show_changes(RAN)
    assert not (rerun / "data/runs").exists() and capsys.readouterr().out == ""


def test_a_commit_that_cannot_be_compared_does_not_end_the_run(rerun, capsys):
    (rerun / "data/report/index.html").write_text("not ours")
    summary.show_changes(RAN)
    assert "what changed since HEAD cannot be told: the page of the report has no" in capsys.readouterr().out


@pytest.mark.parametrize("stale", [set(), {"report"}])
def test_a_night_tells_what_changed_in_its_report_only_if_that_is_new(stale, rerun, monkeypatch):
    project.commit(rerun, "a night")
    project.run(rerun, "git", "branch", "night")
    told = {}
    monkeypatch.setattr(
        scheduled, "create_markdown_artifact", lambda text, **facts: told.update(facts, text=text)
    )
    monkeypatch.setattr(scheduled, "get_run_logger", lambda: logging.getLogger("night"))
    monkeypatch.setattr(scheduled.graph, "consult", lambda _: stale)
    scheduled._tell_changes("night")
    page = (rerun / "data/runs/since-night.html").read_text()
    assert told["key"] == "since-night" and "quantize/q" in told["text"] and "quantize/q" in page
    assert ('<section id="since"' in page) == (not stale), "an old report is not joined to new changes"
    monkeypatch.setattr(scheduled, "compare", lambda _: {}["verdicts"])
    scheduled._tell_changes("night")
    assert "what changed since night~1 cannot be told: 'verdicts'" in told["text"]


def test_what_others_wrote_stays_text(in_little):
    changes = compare(["base/m", "quantize/q"]) | {"revisions": ["<b>", "now"]}
    text = with_changes(PAGE, changes)
    assert "<script>" not in text and "&lt;script&gt;" in text and "<b>" not in text
