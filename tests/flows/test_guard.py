"""A stage ends with the flow, however the flow ends."""

import fcntl
import signal
import subprocess
import sys

import psutil
import pytest

from flows.guard import BOUND
from flows.process import GUARD

SLEEP = "import time; print('up', flush=True); time.sleep(60)"
NESTED = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}])"
"""A command that waits for another, as DVC for a stage."""


def guarded(code):
    """Run code under a guard; return it when what the code starts is up."""
    process = subprocess.Popen(
        [*GUARD, sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    return process, psutil.Process(process.pid).children(recursive=True)


def alive(processes):
    return [process for process in processes if process.is_running() and process.status() != "zombie"]


@pytest.mark.parametrize("code", [0, 3])
def test_the_exit_code_is_the_commands(code):
    command = [*GUARD, sys.executable, "-c", f"raise SystemExit({code})"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.wait() == code


def test_closing_the_pipe_ends_the_command_and_what_it_started():
    process, started = guarded(NESTED)
    assert len(started) == 2
    with process.stdout:
        process.stdin.close()
        assert process.wait(5) == 128 + signal.SIGTERM
    assert not alive(started)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_guard_ends_the_command_and_what_it_started(number):
    process, started = guarded(NESTED)
    with process.stdout, process.stdin:
        process.send_signal(number)
        assert process.wait(5) == 128 + signal.SIGTERM
    assert not alive(started)


@pytest.mark.drill
def test_a_command_deaf_to_sigterm_is_killed():
    process, started = guarded(f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}")
    with process.stdout:
        process.stdin.close()
        assert process.wait(10) == 128 + signal.SIGKILL
    assert not alive(started)


def test_what_a_killed_command_started_is_ended():
    process, started = guarded(NESTED)
    with process.stdout, process.stdin:
        started[0].kill()
        assert process.wait(5) == 128 + signal.SIGKILL
    assert not alive(started)


def test_the_stage_of_a_killed_flow_ends_and_then_its_lock(tmp_path):
    flow = f"""
import fcntl, subprocess, sys
held = open({str(tmp_path / "lock")!r}, "w")
fcntl.flock(held, fcntl.LOCK_EX)
command = [*{GUARD!r}, sys.executable, "-c", {NESTED!r}]
subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[held.fileno()]).wait()
"""
    process = subprocess.Popen([sys.executable, "-c", flow], stdout=subprocess.PIPE, text=True)
    with process.stdout, (tmp_path / "lock").open("a") as file:
        assert process.stdout.readline() == "up\n"
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) == 3
        process.kill()
        process.wait()
        fcntl.flock(file, fcntl.LOCK_EX)  # waits for the guard
        assert not alive([other for other in started if other.pid != started[0].pid])


@pytest.mark.parametrize("bound", [True, False])
def test_a_bound_command_dies_even_if_its_guard_is_killed(bound):
    process = subprocess.Popen(
        [*GUARD, *([BOUND] if bound else []), sys.executable, "-c", SLEEP],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "up\n"
    started = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(started, 5 if bound else 0.5)
    assert bool(alive(left)) != bound
    for each in left:
        each.kill()
    process.stdin.close()
    process.stdout.close()
