"""Runs as commits, in a clone beside a person's folder, without DVC."""

import os
import re
import subprocess
import sys
import threading
import time

import pytest

from flows import commits
from flows.commits import Branch
from flows.lockfile import joined
from stages.core.errors import Refusal
from stages.job.locked import whole


def entry(name, md5):
    return f"  {name}:\n    cmd: make {name}\n    outs:\n    - path: {name}.txt\n      md5: {md5}\n"


def lock(**outs):
    return joined({name: entry(name, md5) for name, md5 in outs.items()})


def git(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder, message, **files):
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", message)
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def person(tmp_path):
    """A person's folder, where `main` is checked out."""
    folder = tmp_path / "person"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    commit(folder, "start", params_yaml="a: 1\n", dvc_lock=lock(a="1", b="1"))
    return folder


@pytest.fixture
def clone(person, monkeypatch):
    """A clone for runs, to be in; DVC's commands are noted in `calls` and do nothing."""
    folder = person.parent / "clone"
    git(person.parent, "clone", "-q", str(person), str(folder))
    monkeypatch.chdir(folder)
    calls = []
    monkeypatch.setattr(commits, "dvc", lambda *arguments, ok=True: calls.append(arguments))
    return folder


def run(clone, branch, text, state="Completed", message="3 ran"):
    """One run that ends with this lock."""
    branch.begin("main")
    (clone / "dvc.lock").write_text(text)
    return branch.end(state, message)


def locked(revision="HEAD"):
    shown = subprocess.run(["git", "show", f"{revision}:dvc.lock"], capture_output=True, text=True).stdout
    return {name: str(stage["outs"][0]["md5"]) for name, stage in whole(shown).items()}


def test_each_run_is_a_commit_and_no_branch_of_a_person_moves(person, clone):
    main = git(person, "rev-parse", "main")
    assert not run(clone, Branch("night"), lock(a="2", b="1"))
    later = commit(person, "an edit", params_yaml="a: 2\n")
    assert run(clone, Branch("night"), lock(a="3", b="1"), "Failed", "a: it broke\nfor two reasons")
    assert (git(person, "rev-parse", "main"), git(clone, "rev-parse", "main")) == (later, main)
    assert git(clone, "branch", "--show-current") == "" and git(clone, "status", "--porcelain") == ""
    assert (locked("night"), locked("night~1")) == ({"a": "3", "b": "1"}, {"a": "2", "b": "1"})
    assert (git(clone, "rev-parse", "night^2"), git(clone, "rev-parse", "night~1^1")) == (later, main)
    assert git(clone, "show", "night:params.yaml") == "a: 2"
    tags = git(clone, "for-each-ref", "--format=%(refname:short) %(objectname)", "refs/tags/night").split(
        "\n"
    )
    assert git(clone, "rev-parse", "night") in tags[-1]
    last, first = commits.runs()
    assert (last.revision, last.state, last.source, last.summary) == (
        "night", "Failed", later[:10], "a: it broke",
    )  # fmt: skip
    assert (first.revision, first.state, first.summary) == ("night~1", "Completed", "3 ran")
    assert "for two reasons" in git(clone, "log", "-1", "--format=%B", "night")
    run(clone, Branch("night"), lock(a="3", b="2"), "Failed", "a: page\x0cone\u2028two")
    assert [each.summary for each in commits.runs()] == ["a: page\x0cone\u2028two", "a: it broke", "3 ran"]


def test_a_run_begins_with_the_last_lock_but_where_the_source_changed_its_own(person, clone):
    run(clone, Branch("night"), lock(a="night", b="night", c="night"))
    commit(person, "a person computed b", dvc_lock=lock(a="1", b="person", d="person"))
    Branch("night").begin("main")
    assert locked() == {"a": "night", "b": "person", "c": "night", "d": "person"}
    assert git(clone, "diff", "--name-only", "main", "HEAD") == "dvc.lock"


def test_a_clone_with_edits_is_refused_and_keeps_them(clone):
    (clone / "params.yaml").write_text("a: mine\n")
    (clone / "ä b.txt").write_text("new\n")
    with pytest.raises(Refusal, match=r"holds edits \(params.yaml, ä b.txt\).*git stash"):
        Branch("night").begin("main")
    assert (clone / "params.yaml").read_text() == "a: mine\n"
    assert git(clone, "branch", "--show-current") == "main"


def test_the_lock_that_a_killed_run_left_is_no_edit(clone):
    (clone / "dvc.lock").write_text("cut")
    Branch("night").begin("main")
    assert locked() == {"a": "1", "b": "1"}


def test_a_source_that_is_nowhere_is_refused(clone):
    with pytest.raises(Refusal, match="no branch, tag or commit 'mian'"):
        Branch("night").begin("mian")


def test_workers_follow_a_branch_that_goes_when_the_run_is_committed(person, clone):
    branch = Branch("spread")
    branch.begin("main")
    first = branch.publish()
    assert branch.publish() == first
    (clone / "dvc.lock").write_text(lock(a="2", b="1"))
    second = branch.publish()
    assert git(person, "rev-parse", "running/spread", f"{second}^") == f"{second}\n{first}"
    assert locked(second) == {"a": "2", "b": "1"}
    branch.end("Completed", "1 ran")
    branch.clear()
    assert git(person, "branch", "--list", "running/*") == ""


def test_a_run_goes_on_where_one_was_cut_off(person, clone):
    cut = Branch("spread")
    cut.begin("main")
    (clone / "dvc.lock").write_text(lock(a="2", b="1"))
    cut.publish()
    git(clone, "checkout", "-q", "--force", "main")
    again = Branch("spread")
    again.begin("main")
    assert again.id == cut.id
    assert locked() == {"a": "2", "b": "1"}
    again.end("Completed", "nothing ran")
    again.clear()
    new = Branch("spread")
    new.begin("main")
    assert new.id not in ("", cut.id)
    assert git(person, "branch", "--list", "running/*") == ""


def test_a_new_clone_goes_on_with_the_pushed_branch(person, clone, tmp_path, monkeypatch):
    branch = Branch("night")
    run(clone, branch, lock(a="2", b="1"))
    branch.push()
    other = tmp_path / "other"
    git(tmp_path, "clone", "-q", str(person), str(other))
    monkeypatch.chdir(other)
    assert run(other, Branch("night"), lock(a="3", b="1"))
    assert git(other, "rev-parse", "night~1") == git(clone, "rev-parse", "night")
    assert [each.revision for each in commits.runs("night")] == ["night", "night~1"]


def test_runs_are_listed_by_time_whatever_their_zone(clone, monkeypatch):
    said = {"night": "2026-03-01T01:00:00+02:00", "day": "2026-02-28T23:30:00+00:00"}
    row = ("Completed", "", "")
    monkeypatch.setattr(commits, "git", lambda *_: "\n".join(said))
    monkeypatch.setattr(commits, "_runs_on", lambda name: [commits.PastRun(name, said[name], *row)])
    assert [each.revision for each in commits.runs()] == ["day", "night"]


def test_a_branch_without_runs_is_refused(clone):
    with pytest.raises(Refusal, match="no run is on branch 'main'"):
        commits.runs("main")
    with pytest.raises(Refusal, match="no branch here holds runs"):
        commits.runs()


def test_workers_compute_what_is_committed(person, monkeypatch):
    monkeypatch.chdir(person)
    assert commits.committed_head() == git(person, "rev-parse", "HEAD")
    (person / "params.yaml").write_text("a: 5\n")
    with pytest.raises(Refusal, match=r"params.yaml changed and not committed"):
        commits.committed_head()


@pytest.mark.parametrize("value", [None, "", ".", "/nowhere"])
def test_a_run_needs_a_clone_of_its_own(person, monkeypatch, value):
    monkeypatch.chdir(person)
    monkeypatch.delenv("PRUNEQUANT_CLONE", raising=False)
    if value is not None:
        monkeypatch.setenv("PRUNEQUANT_CLONE", value)
    with pytest.raises(Refusal, match=r"PRUNEQUANT_CLONE is .*; set it to a clone of this project"):
        commits.enter_clone()


def test_a_dvc_command_that_is_blocked_is_tried_again(monkeypatch):
    busy = "ERROR: 'a' is busy, it is being blocked by:\n  (PID 7): dvc repro\n"
    ends = [subprocess.CompletedProcess((), 255, busy), subprocess.CompletedProcess((), 0, "")]
    monkeypatch.setattr(commits, "run_guarded", lambda *_: ends.pop(0))
    commits.dvc("fetch")
    assert ends == []


@pytest.mark.parametrize(
    ("reason", "left"), [("failed to connect to s3 (store): timed out", 0), ("no key", 3)]
)
def test_a_dvc_command_is_tried_again_if_the_network_failed_it(monkeypatch, capsys, reason, left):
    ends = [subprocess.CompletedProcess((), 1, f"3 files\nERROR: {reason}\n")] * 4
    monkeypatch.setattr(commits, "run_guarded", lambda *_: ends.pop(0))
    monkeypatch.setattr(commits, "_PAUSES", (0, 0, 0))
    with pytest.raises(Refusal, match=re.escape(reason)):
        commits.dvc("pull")
    assert len(ends) == left
    ends += [subprocess.CompletedProcess((), 1, "ERROR: no credentials\n")]
    del ends[:-1]
    commits.dvc("fetch", ok=False)
    assert "no credentials" in capsys.readouterr().out


def test_a_stopped_run_ends_its_dvc_command(tmp_path, monkeypatch):
    monkeypatch.setattr(commits, "DVC", (sys.executable, "-c", "import time; time.sleep(60)"))
    stopped = threading.Event()
    threading.Timer(0.3, stopped.set).start()
    before = time.monotonic()
    with pytest.raises(InterruptedError):
        commits.dvc("push", stopped=stopped)
    assert time.monotonic() - before < 20


def test_a_run_that_another_follows_ends_and_the_other_has_what_it_finished(
    person, clone, tmp_path, monkeypatch
):
    first = Branch("spread")
    first.begin("main")
    (clone / "dvc.lock").write_text(lock(a="2", b="1"))
    published = first.publish()
    other = tmp_path / "other"
    git(tmp_path, "clone", "-q", str(person), str(other))
    monkeypatch.chdir(other)
    second = Branch("spread")
    second.begin("main")
    assert second.id == first.id and locked() == {"a": "2", "b": "1"}
    later = second.publish()
    assert git(person, "merge-base", published, later) == published, (
        "workers still find the first run's commit"
    )
    monkeypatch.chdir(clone)
    (clone / "dvc.lock").write_text(lock(a="2", b="2"))
    with pytest.raises(Refusal, match="another run of branch spread has begun"):
        first.publish()
    first.end("Failed", "another run")
    first.clear()
    assert git(person, "rev-parse", "running/spread") == later


@pytest.mark.parametrize("name", ["a b", "-x", "a..b", ""])
def test_a_branch_without_a_good_name_is_refused(clone, name):
    with pytest.raises(Refusal, match="is no name for a git branch"):
        Branch(name).begin("main")


def test_a_branch_of_other_commits_is_refused(person, clone):
    git(person, "branch", "feature")
    for name in ("main", "feature"):
        with pytest.raises(Refusal, match=f"branch {name} holds other commits than runs"):
            Branch(name).begin("main")
    assert git(clone, "rev-parse", "HEAD") == git(person, "rev-parse", "main")


def test_a_worker_starts_again_only_if_code_that_it_loaded_has_changed(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(commits.os, "execv", lambda *arguments: started.append(arguments))
    code = tmp_path / "code.py"
    code.touch()
    monkeypatch.setattr(commits, "__file__", str(code))
    os.utime(code, (1, 1))
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "one")
    monkeypatch.setenv("PRUNEQUANT_RENEWED", repr(time.time()))
    commits.renew()
    assert not started
    future = time.time() + 100
    os.utime(code, (future, future))
    commits.renew()
    assert started == [(sys.executable, sys.orig_argv)]
    code.unlink()
    commits.renew()
    monkeypatch.delenv("PREFECT__FLOW_RUN_ID")
    commits.renew()
    assert len(started) == 2


def test_a_run_that_cannot_begin_is_a_commit_and_keeps_the_edits(person, clone):
    run(clone, Branch("night"), lock(a="2", b="1"))
    (clone / "params.yaml").write_text("edited")
    with pytest.raises(Refusal, match="holds edits"):
        Branch("night").begin("main")
    Branch("night").refuse("the clone holds edits")
    last, first = commits.runs("night")
    assert (last.state, last.summary, first.state) == ("Failed", "the clone holds edits", "Completed")
    assert locked("night") == {"a": "2", "b": "1"}
    assert (clone / "params.yaml").read_text() == "edited"


def test_the_first_run_that_cannot_begin_is_a_commit_too(clone):
    Branch("night").refuse("no such branch")
    assert [(run.state, run.summary) for run in commits.runs("night")] == [("Failed", "no such branch")]


def test_a_result_that_disagrees_with_the_lock_is_not_pushed(person, clone, monkeypatch):
    branch = Branch("night")
    run(clone, branch, lock(a="2", b="1"))
    monkeypatch.setattr(commits.provenance, "disagreements", lambda stages: {"a": "x in params.yaml"})
    with pytest.raises(Refusal, match=r"a disagree with dvc\.lock, so nothing is pushed"):
        branch.push()
    assert git(person, "branch", "--list", "night") == ""
