"""Prefect's server: refused if it does not answer; a temporary one ends with its flow and is soon missed."""

import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)

from flows import server
from stages.core.errors import Refusal
from tests import finished as sweep

START = """
import os, sys, time
from flows import server
server.configure()
server.start(lambda: print("lost", flush=True))
print("up", flush=True)
time.sleep(60)
"""


@pytest.fixture
def flow(tmp_path):
    """A process with a temporary server, in a process group of its own."""
    env = {**os.environ, "PREFECT_HOME": str(tmp_path), "MARK": f"server-{tmp_path}"}
    process = subprocess.Popen(
        [sys.executable, "-c", START], env={**env, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "up\n"
        yield process
        process.kill()
        process.wait()


def processes(tmp_path) -> list[str]:
    return [command for command in sweep.processes(f"server-{tmp_path}") if "uvicorn" in command]


def wait_until_gone(tmp_path) -> None:
    deadline = time.monotonic() + 15
    while processes(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_configured_server_that_does_not_answer_is_refused():
    refused = pytest.raises(Refusal, match=r"http://127.0.0.1:9/api does not serve this run .*`dvc repro`")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}), refused:
        server.start(pytest.fail)


def test_an_address_that_is_none_is_refused():
    refused = pytest.raises(Refusal, match=r"127.0.0.1:port/api does not serve this run .*`dvc repro`")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:port/api"}), refused:
        server.start(pytest.fail)


def test_a_server_with_a_password_says_that_it_needs_one():
    class Closed(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(401)
            self.end_headers()

        def log_message(self, *words):
            pass

    with HTTPServer(("127.0.0.1", 0), Closed) as closed:
        threading.Thread(target=closed.serve_forever, daemon=True).start()
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{closed.server_port}/api"}):
            assert "it answers 401; set PREFECT_API_AUTH_STRING" in server.why_silent()
        closed.shutdown()


def test_a_home_that_cannot_be_written_is_refused():
    refused = pytest.raises(Refusal, match=r"in /proc/nowhere .*PREFECT_HOME.*`dvc repro`")
    with temporary_settings({PREFECT_HOME: "/proc/nowhere"}), refused:
        server.start(pytest.fail)


def test_a_server_that_dies_while_it_starts_is_soon_missed(tmp_path, monkeypatch):
    def dying(self):
        return subprocess.Popen([sys.executable, "-IS", "-c", ""])

    monkeypatch.setattr(SubprocessASGIServer, "_run_uvicorn_command", dying)
    missed = threading.Event()
    settings = {PREFECT_HOME: tmp_path, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 1}
    with temporary_settings(settings), pytest.raises(Refusal, match="cannot start"):
        server.start(missed.set)
    assert missed.wait(5)


def test_prefects_database_is_in_the_project_and_its_profiles_are_the_users(tmp_path, monkeypatch):
    home, project = tmp_path / "home", tmp_path / "project"
    (home / ".prefect").mkdir(parents=True)
    (home / ".prefect/profiles.toml").touch()
    (project / ".dvc").mkdir(parents=True)
    monkeypatch.chdir(project)
    code = "import os; from flows.server import configure; configure(); "
    code += "print(os.environ['PREFECT_HOME'], os.environ['PREFECT_PROFILES_PATH'])"
    env = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    env |= {"HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == [str(project / ".dvc/tmp/prefect"), str(home / ".prefect/profiles.toml")]


@pytest.mark.drill
def test_a_server_outlives_a_signal_to_the_group_and_ends_with_the_flow(flow, tmp_path):
    assert processes(tmp_path)
    os.killpg(flow.pid, signal.SIGKILL)
    flow.wait()
    wait_until_gone(tmp_path)


@pytest.mark.drill
def test_the_death_of_the_server_is_noticed(flow, tmp_path):
    import psutil

    for process in psutil.process_iter(["cmdline", "environ"]):
        environ = process.info["environ"] or {}
        if environ.get("MARK") == f"server-{tmp_path}" and process.info["cmdline"][1:3] == ["-m", "uvicorn"]:
            process.kill()
    line: list[str] = []
    reader = threading.Thread(target=lambda: line.append(flow.stdout.readline()), daemon=True)
    reader.start()
    reader.join(10)
    assert line == ["lost\n"]
    assert flow.poll() is None
