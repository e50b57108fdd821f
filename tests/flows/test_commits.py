"""Runs as commits, in a clone beside a person's folder, without DVC."""

import subprocess

import pytest

from flows import commits
from flows.commits import Branch
from flows.lockfile import joined, whole
from stages.core.errors import Refusal


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
    ends = [subprocess.CompletedProcess((), 255, "", busy), subprocess.CompletedProcess((), 0, "", "")]
    monkeypatch.setattr(commits.subprocess, "run", lambda *_, **__: ends.pop(0))
    commits.dvc("fetch")
    assert ends == []
