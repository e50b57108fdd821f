"""One run a workspace at a time: who waits for whom, and what killed runs leave behind."""

import fcntl
import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest

from flows import graph, workspace
from flows.process import CHATTER
from tests import project, toy

RWLOCK = workspace.DVC_TMP / "rwlock"
BUSY = "ERROR: 'a' is busy, it is being blocked by:\n  (PID 7): dvc repro\n\nIf there are no"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    toy.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def note(folder, pid, command="dvc repro"):
    """Write DVC's table as if a process wrote `a.txt` and read `data/code`."""
    info = {"pid": pid, "cmd": command}
    RWLOCK.write_text(
        json.dumps({"write": {f"{folder}/a.txt": info}, "read": {f"{folder}/data/code": [info]}})
    )


def table():
    return json.loads(RWLOCK.read_text()) if RWLOCK.exists() else {"write": {}, "read": {}}


def test_a_second_flow_waits_and_says_so(folder, capsys):
    with (workspace.DVC_TMP / "prunequant.lock").open("a+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("since 12:40 (pid 7)\n")
        other.flush()
        threading.Timer(0.5, lambda: fcntl.flock(other, fcntl.LOCK_UN)).start()
        with workspace.alone() as held:
            assert os.fstat(held[0]).st_ino == os.fstat(other.fileno()).st_ino
    assert "another run works here since 12:40 (pid 7); waiting" in capsys.readouterr().out
    assert f"(pid {os.getpid()})" in (workspace.DVC_TMP / "prunequant.lock").read_text()


@pytest.mark.parametrize("kind", ["dead", "zombie", "another program", "younger than the table"])
def test_a_process_that_ended_is_no_obstacle(folder, capsys, kind):
    process = toy.sleeper(*(["dvc"] if kind == "younger than the table" else []))
    if kind in ("dead", "zombie"):
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | (os.WNOWAIT if kind == "zombie" else 0))
    note(folder, process.pid)
    if kind == "younger than the table":
        os.utime(RWLOCK, (1e9, 1e9))
    with workspace.alone():
        assert table() == {"write": {}, "read": {}}
    assert capsys.readouterr().out == ""
    process.kill()
    process.wait()


@pytest.mark.parametrize("text", ["", '{"write": {"/a', "[]", '{"write": {"a": 3}}'])
def test_a_table_that_was_cut_off_is_no_obstacle(folder, text):
    RWLOCK.write_text(text)
    with workspace.alone():
        assert table() == {"write": {}, "read": {}}


def test_a_flow_waits_for_a_living_dvc(folder, capsys):
    process = toy.sleeper("dvc", "repro")
    note(folder, process.pid)
    threading.Timer(0.5, process.kill).start()
    with workspace.alone():
        assert process.poll() is not None or process.wait(1)
    assert f"dvc repro (pid {process.pid}) works here; waiting until it has ended" in capsys.readouterr().out


def test_dvc_beside_a_flow_ends_before_it_changes_anything(folder):
    with workspace.alone():
        workspace.claim()
        beside = toy.dvc("repro")
        alone = toy.dvc("repro", "--single-item", "a")  # as the flow runs a stage; lacks its input here
    assert beside.returncode and "stages' is busy" in beside.stderr, beside.stderr
    assert workspace.BUSY.search(beside.stderr) and not workspace.BUSY.search(alone.stderr)
    assert not (folder / "data").exists() and not (folder / "dvc.lock").exists()
    assert table() == {"write": {}, "read": {}}
    shown = [line for line in beside.stderr.splitlines() if not CHATTER.fullmatch(line)]
    assert not re.search("rwlock|remove", "".join(shown)), shown
    assert toy.dvc("repro").returncode == 0


def test_what_is_busy_is_tried_again(folder):
    results = [BUSY, BUSY, ""]
    shown, pauses = [], []

    def attempt():
        if text := results.pop(0):
            raise workspace.Busy(text)
        return "done"

    assert workspace.insist(attempt, shown.append, pauses.append) == "done"
    assert (shown, pauses) == (["waits for (PID 7): dvc repro"], [0.5, 1.0])


def test_the_stage_of_a_killed_dvc_is_ended(folder, capsys):
    orphan = toy.sleeper(DVC_ROOT=str(folder), DVC_STAGE="a")
    other = toy.sleeper(DVC_ROOT=f"{folder}/other", DVC_STAGE="a")
    try:
        with workspace.alone():
            orphan.wait(5)
            assert other.poll() is None
    finally:
        other.kill()
        other.wait()
    assert capsys.readouterr().out.count("a | stopped: left over from a killed run") == 1


@pytest.mark.drill
def test_a_flow_that_plans_waits_without_what_a_running_dvc_needs(folder):
    """DVC takes its lock again when its stage ends, and gives up after three seconds."""
    for stage in ("code", "a"):
        assert toy.dvc("repro", stage).returncode == 0
    slow = toy.YAML.replace(
        "cmd: cp data/code/x b.txt", "cmd: touch begun && sleep 8 && cp data/code/x b.txt"
    )
    (folder / "dvc.yaml").write_text(slow)
    bare = subprocess.Popen([sys.executable, "-m", "dvc", "repro"], env=project.ENV)
    while not (folder / "begun").exists():
        assert bare.poll() is None
        time.sleep(0.1)
    assert graph.consult(graph.Project.stale) == set()
    assert bare.wait(60) == 0 and "b.txt" in (folder / "dvc.lock").read_text()


def test_nobody_waits_for_himself():
    """A night that had ended asked DVC what is stale while its own claim kept DVC out."""

    def attempt() -> str:
        raise workspace.Busy(f"'stages' is busy, it is being blocked by: (PID {os.getpid()}): engine.py")

    with pytest.raises(RuntimeError, match=r"call release\(\) first"):
        workspace.insist(attempt, print, lambda _: pytest.fail("it waits"))
