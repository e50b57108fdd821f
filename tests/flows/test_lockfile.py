"""dvc.lock survives a full disk and a kill."""

import errno
import subprocess

import pytest

from flows import lockfile
from flows.lockfile import SafeLock, beginning
from flows.plan import Plan
from flows.resources import Pool
from stages.core.errors import Refusal
from stages.job.locked import whole
from tests import toy

COPY = ".dvc/tmp/dvc.lock.good"
LONG = "perplexity@" + "x" * 140


def entry(name, md5="a" * 32):
    """The text of an entry as DVC writes it; a name this long is written on a line of its own."""
    key = f"  ? {name}\n  : " if len(name) > 128 else f"  {name}:\n    "
    return (
        f"{key}cmd: python -m stages.prune {name}\n    deps:\n    - path: data/code/x\n      hash: md5\n"
        f"      md5: {md5}\n      size: 12\n    params:\n      params.yaml:\n        {name}:\n"
        f"          rate: 1e-05\n    outs:\n    - path: data/models/{name}\n      hash: md5\n"
        f"      md5: {md5}\n"
    )


def text(*entries):
    return "schema: '2.0'\nstages:\n" + "".join(entries)


ALL = text(entry("a"), entry(LONG), entry("b"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    toy.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_cut_lock_is_never_whole_with_a_wrong_entry():
    entries = whole(ALL)
    assert list(entries) == ["a", LONG, "b"]
    for length in range(len(ALL)):
        kept = whole(beginning(ALL[:length], entries)) or {}
        assert kept == {name: entries[name] for name in list(entries)[: len(kept)]}


def test_a_stage_without_outputs_and_one_with_a_remote_output_are_whole(folder):
    without = entry("m").partition("    outs:")[0]
    remote = entry("n").replace(f"md5: {'a' * 32}\n", "etag: abc\n").replace("hash: md5", "hash: etag")
    (folder / "dvc.lock").write_text(text(entry("a"), without, remote, entry("z")))
    lock = SafeLock()
    lock.begin()
    assert list(lock.keep()) == ["a", "m", "n", "z"] and lock.mended == 0
    cut = text(entry("a"), without, remote, entry("z").partition("    outs:")[0])
    (folder / "dvc.lock").write_text(cut)
    assert lock.keep()["z"]["outs"] and lock.mended == 1


def test_a_lock_that_cannot_be_restored_is_left_as_it_is(folder, monkeypatch):
    (folder / "dvc.lock").write_text(ALL)
    lock = SafeLock()
    lock.begin()
    monkeypatch.setattr(lockfile, "entry_texts", lambda text: {})
    (folder / "dvc.lock").write_text(ALL[:300])
    with pytest.raises(Refusal, match="cannot be restored from its copy"):
        lock.keep()
    assert (folder / "dvc.lock").read_text() == ALL[:300]


@pytest.mark.parametrize("left", [0, 10, 300, ALL.index("  ?"), ALL.index("  b:"), len(ALL) - 1])
def test_a_cut_lock_is_restored_before_planning(folder, capsys, left):
    (folder / "dvc.lock").write_text(ALL)
    SafeLock().begin()
    (folder / "dvc.lock").write_text(ALL[:left])
    lock = SafeLock()
    lock.begin()
    assert lock.mended == 1
    assert (folder / "dvc.lock").read_text() == text(entry("a"), entry("b"), entry(LONG))
    assert "".join(capsys.readouterr()).count("dvc.lock was cut off") == 1


def test_without_a_copy_the_commit_is_the_copy(folder):
    (folder / "dvc.lock").write_text(ALL)
    for command in (
        ["init", "-q"],
        ["add", "dvc.lock"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *command], check=True)
    (folder / "dvc.lock").write_text("")
    lock = SafeLock()
    lock.begin()
    assert set(lock.entries) == {"a", "b", LONG}


def test_a_lock_of_another_commit_and_none_are_taken_as_they_are(folder):
    for content in (ALL, text(entry("b", "f" * 32))):
        (folder / "dvc.lock").write_text(content)
        lock = SafeLock()
        lock.begin()
        assert (folder / "dvc.lock").read_text() == content == (folder / COPY).read_text()
    (folder / "dvc.lock").unlink()
    lock = SafeLock()
    lock.begin()
    assert lock.entries == {} and not (folder / COPY).exists()
    (folder / "dvc.lock").write_text(text(entry("b")))
    assert set(lock.keep()) == {"b"} and lock.mended == 0


def test_a_merge_conflict_is_refused(folder):
    (folder / "dvc.lock").write_text(ALL.replace("    cmd", "<<<<<<< ours\n    cmd", 1))
    with pytest.raises(Refusal, match="merge conflict; keep a side"):
        SafeLock().begin()


def test_no_entry_is_lost_when_a_stage_beside_writes_over_a_cut_lock(folder):
    (folder / "dvc.lock").write_text(text(entry("a"), entry("b")))
    lock = SafeLock()
    lock.begin()
    (folder / "dvc.lock").write_text(text(entry("b", "f" * 32), entry("c")))  # DVC read an empty file
    kept = lock.keep()
    assert list(kept) == ["a", "b", "c"] and kept["b"]["outs"][0]["md5"] == "f" * 32
    assert whole((folder / "dvc.lock").read_text()) == whole((folder / COPY).read_text()) == kept


def test_a_full_disk_keeps_the_last_copy(folder, monkeypatch):
    (folder / "dvc.lock").write_text(text(entry("a")))
    lock = SafeLock()
    lock.begin()
    real = lockfile.write_text

    def full(file, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lockfile, "write_text", full)
    (folder / "dvc.lock").write_text(ALL)
    assert set(lock.keep()) == {"a", "b", LONG}
    assert (folder / COPY).read_text() == text(entry("a"))
    (folder / "dvc.lock").write_text("")
    with pytest.raises(OSError, match="No space"):
        lock.keep()
    monkeypatch.setattr(lockfile, "write_text", real)
    assert set(lock.keep()) == {"a", "b", LONG} == set(whole((folder / "dvc.lock").read_text()))


def test_sorting_moves_entries_and_changes_no_number(folder):
    (folder / "dvc.lock").write_text(text(entry("b"), entry("a")))
    lock = SafeLock()
    lock.begin()
    lock.sort()
    assert (folder / "dvc.lock").read_text() == text(entry("a"), entry("b"))
    assert lock.mended == 0


def test_a_stage_whose_entry_was_cut_off_is_restored_from_the_run_cache(folder):
    """Beside a stage that ends well, a killed DVC leaves half of a lock."""
    run = Plan(dict(toy.GRAPH), Pool(1), stale=set(toy.GRAPH), todo=list(toy.GRAPH))
    assert [run.advance(name).state for name in ("code", "a")] == ["ran", "ran"]
    before = (folder / "dvc.lock").read_text()
    real, calls = run.children.repro, []

    def repro(name, show, force, variables):
        done = real(name, show, force, variables)
        if not calls:
            (folder / "dvc.lock").write_text(before[: len(before) // 2])
        calls.append(done[1])
        return done

    run.children.repro = repro
    assert run.advance("b").state == "ran"
    assert len(calls) == 2 and "is cached - skipping run" in calls[1]
    assert toy.dvc("status").stdout.strip() == "Data and pipelines are up to date."
    assert run.lock.mended == 1
