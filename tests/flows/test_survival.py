"""Whole projects that are killed, run twice at once, or run out of disk."""

import os
import signal
import subprocess
import time

import pytest

from stages.job.locked import whole
from tests import finished as sweep
from tests import project

pytestmark = pytest.mark.drill


def start(folder, *command):
    """Start a command in the project, marked by the folder."""
    return subprocess.Popen(
        command, cwd=folder, env={**sweep.environment(folder), "SWEEP_MARK": str(folder)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # A shell's background job, which the tests may be part of, is born deaf to ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def slow(folder, word, seconds=20):
    """Let the next command that names `word` sleep before it works; Python imports this file first."""
    (folder / "sitecustomize.py").write_text(
        "import sys, time, pathlib\n"
        f"if {word!r} in sys.orig_argv:\n    pathlib.Path(__file__).unlink()\n    time.sleep({seconds})\n"
    )
    sweep.edit(folder, "prune.magnitude-50.sparsity", 0.125)


def wait_until_asleep(folder, seconds=30):
    """Wait until the command sleeps."""
    deadline = time.monotonic() + seconds
    while (folder / "sitecustomize.py").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def read_until(process, words):
    """Read a process's output until a line holds `words`; return what was read."""
    read = []
    for line in process.stdout:
        read.append(line)
        if words in line:
            return "".join(read)
    raise AssertionError("".join(read))


def asleep_in_prune(folder, seconds=20):
    """Start a flow; return it when the stage prune sleeps, before it has read its params."""
    slow(folder, "stages.prune", seconds)
    flow = start(folder, "prunequant", "run")
    read_until(flow, "> python -m stages.prune")
    wait_until_asleep(folder)
    return flow


def end(process, code=0):
    """Wait for a process; return the rest of what it printed."""
    with process.stdout:
        rest = process.stdout.read()
    assert process.wait(60) == code, rest
    return rest


def is_whole(folder):
    return set(whole((folder / "dvc.lock").read_text())) == sweep.STAGES and sweep.status(folder) == set()


def test_a_killed_flow_takes_its_stages_along(copy):
    flow = asleep_in_prune(copy)
    flow.send_signal(signal.SIGKILL)
    flow.wait()
    again = start(copy, "prunequant", "run")  # at once
    output = end(again)
    flow.stdout.close()
    assert "rwlock" not in output and "ERROR" not in output
    assert is_whole(copy), output
    assert sweep.processes(f"SWEEP_MARK={copy}") == []


def test_two_flows_at_once_both_succeed(copy):
    sweep.edit(copy, "prune.magnitude-50.sparsity", 0.125)
    flows = [start(copy, "prunequant", "run") for _ in range(2)]
    outputs = [end(flow) for flow in flows]
    assert sum("another run works here since" in output for output in outputs) == 1
    assert sum("prune@magnitude-50 | ran" in output for output in outputs) == 1
    assert is_whole(copy)


def test_a_flow_waits_for_dvc(copy):
    slow(copy, "stages.prune")
    bare = start(copy, "dvc", "repro")
    read_until(bare, "> python -m stages.prune")
    output = end(start(copy, "prunequant", "run"))
    end(bare)
    assert f"dvc repro (pid {bare.pid}) works here; waiting" in output
    assert "Everything is cached" in output
    assert is_whole(copy)


def test_dvc_beside_a_flow_ends_and_nothing_is_lost(copy):
    slow(copy, "stages.prune")
    flow = start(copy, "prunequant", "run")
    read_until(flow, "> python -m stages.prune")
    output = end(start(copy, "dvc", "repro"), 255)
    assert f"is busy, it is being blocked by:\n  (PID {flow.pid}): prunequant run" in output
    rest = end(flow)
    assert "prune@magnitude-50 | ran" in rest and "rwlock" not in rest
    assert is_whole(copy)


def test_the_stage_of_a_killed_dvc_is_ended(copy):
    slow(copy, "stages.prune", 90)
    bare = start(copy, "dvc", "repro")
    read_until(bare, "> python -m stages.prune")
    wait_until_asleep(copy)
    bare.send_signal(signal.SIGKILL)
    bare.wait()
    bare.stdout.close()
    output = end(start(copy, "prunequant", "run"))
    assert "prune@magnitude-50 | stopped: left over from a killed run" in output
    assert is_whole(copy)


@pytest.mark.parametrize("broken", ["broken: [", ""])
def test_a_result_is_back_when_its_params_broke_before_its_stage_began(copy, broken):
    """They do not parse, or do not have the recipe any more."""
    flow = asleep_in_prune(copy, 6)
    params = (copy / "params.yaml").read_text()
    values = project.read(copy)
    del values["prune"]["magnitude-50"]
    project.write(copy, values)
    if broken:
        (copy / "params.yaml").write_text(params + broken)
    assert "params.yaml" in end(flow, 1)
    assert (copy / "data/models/prune/magnitude-50/model.safetensors").exists()
    (copy / "params.yaml").write_text(params)
    sweep.prunequant(copy, "run")
    assert is_whole(copy)


def test_a_stage_that_began_with_other_params_than_dvc_read_is_run_again(copy):
    flow = asleep_in_prune(copy, 6)
    sweep.edit(copy, "prune.magnitude-50.source", "prune/wanda-50")
    assert "changed" in end(flow, 1)
    sweep.prunequant(copy, "run")
    sweep.prunequant(copy, "check")
    assert is_whole(copy)


def test_a_stopped_run_leaves_the_last_result_in_the_folder(copy):
    flow = asleep_in_prune(copy, 60)
    flow.send_signal(signal.SIGINT)
    end(flow, 130)
    assert (copy / "data/models/prune/magnitude-50/model.safetensors").exists()


@pytest.mark.parametrize("left", [0.0, 0.6])
def test_a_cut_lock_runs_nothing_again(copy, left):
    lock = (copy / "dvc.lock").read_text()
    sweep.prunequant(copy, "run")
    (copy / "dvc.lock").write_text(lock[: int(left * len(lock))])
    output = sweep.prunequant(copy, "run")
    assert "dvc.lock was cut off" in output and "Everything is cached" in output
    assert whole((copy / "dvc.lock").read_text()) == whole(lock)  # sorted by the flow


def test_a_full_disk_is_told_in_a_sentence_and_loses_nothing(copy, tmp_path):
    """On a file system of its own, with no room for the new artifact, for a byte, and then with room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", disk]).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        folder = sweep.copy(copy, disk / "project")
        sweep.edit(folder, "prune.magnitude-50.sparsity", 0.125)
        before = set(whole((folder / "dvc.lock").read_text()))
        filler = disk / "filler"
        for room in (0, 30_000):
            fill(disk, filler, room)
            output = run_elsewhere(folder, tmp_path)
            assert output.returncode in (1, 2), output.stdout
            assert f"no space is left on the disk of {folder}" in output.stdout
            assert "Traceback" not in output.stdout and "rwlock" not in output.stdout
            filler.unlink()
        output = run_elsewhere(folder, tmp_path)
        assert output.returncode == 0, output.stdout
        assert before <= set(whole((folder / "dvc.lock").read_text()))
        assert is_whole(folder)
    finally:
        time.sleep(1)
        subprocess.run(["umount", "-l", disk], check=True)


def fill(disk, filler, room):
    """Fill a disk up to so many bytes."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - room)


def run_elsewhere(folder, home):
    """Run the flow with Prefect's database and temporary files on another disk."""
    env = {**sweep.environment(folder), "PREFECT_HOME": str(home / "prefect"), "TMPDIR": str(home)}
    return subprocess.run(
        ["prunequant", "run"],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
