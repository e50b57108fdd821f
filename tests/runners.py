"""Servers as operators run them, on 127.0.0.1: Prefect on PostgreSQL, S3, git, and workers in clones."""

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import project

BUCKET = "prunequant"
HOOK = """import os, pathlib, sys, time
words = getattr(sys, "orig_argv", [])
stage = next((word for word in words if word.startswith("stages.")), None)
if stage and "-m" in words:
    here = pathlib.Path(__file__).parent
    with (here / "log").open("a") as log:
        log.write(f"{os.getcwd()} {stage} {words[-1]}\\n")
    hold = here / "hold"
    if hold.exists() and hold.read_text() in " ".join(words):
        hold.unlink()
        time.sleep(600)
"""
"""Python imports this first: notes each stage that is computed; the first that `hold` names sleeps."""


STAGES = {
    "code", "validate", "model@tiny", "dataset@news", "prune@magnitude-50", "prune@wanda-50",
    "quantize@gptq-w4g32", "perplexity@base/tiny-news", "perplexity@quantize/gptq-w4g32-news", "tidy",
    "report",
}  # fmt: skip


def params(inputs: Path) -> dict[str, Any]:
    """Params of few stages, so that each can cost a flow run."""
    values = project.params(inputs)
    gptq = values["quantize"]["wanda-50-gptq-w4g32"]
    values |= {"datasets": {"news": values["datasets"]["news"]}, "quantize": {"gptq-w4g32": gptq}}
    values |= {"finetune": {}, "noise": {}}
    values["suites"]["graded"] = {}
    values["evaluate"]["candidates"] = ["base/tiny", "quantize/gptq-w4g32"]
    return values


def skip_without() -> None:
    """Skip where a server's program is missing."""
    if not shutil.which("postgres") or not shutil.which("initdb"):
        pytest.skip("PostgreSQL's postgres and initdb are not on the path")
    for module in ("moto", "dvc_s3"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"there is no {module}; pip install -r requirements-runners.lock")


class Runners:
    """The servers, the person's folder, and what workers need to begin."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.person = folder / "person"
        self.origin = folder / "origin.git"
        self.hook = folder / "hook"
        self.database = Path(tempfile.mkdtemp(prefix="prunequant-postgres-"))  # pytest's folders are private
        self.ports = {name: _free_port() for name in ("postgres", "s3", "prefect")}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.env = {
            **project.ENV,
            "PREFECT_API_URL": f"http://127.0.0.1:{self.ports['prefect']}/api",
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }

    def start_servers(self) -> None:
        """Start PostgreSQL, S3 and Prefect, each on a port of its own."""
        data = self.database
        as_user: list[str] = []
        if not os.geteuid():  # PostgreSQL refuses to run as root
            user = next(name for name in ("postgres", "nobody") if _exists(name))
            shutil.chown(data, user)
            as_user = ["setpriv", f"--reuid={user}", "--clear-groups"]
        initdb = [*as_user, "initdb", "-D", str(data), "-U", "prefect", "-A", "trust", "--no-sync"]
        subprocess.run(initdb, check=True, capture_output=True)
        port = str(self.ports["postgres"])
        self.start(
            *as_user, "postgres", "-D", str(data), "-p", port, "-h", "127.0.0.1", "-k", str(data), "-F"
        )
        self.start(sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.ports["s3"]))
        _wait_for(self.ports["postgres"])
        url = f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
        self.start(
            "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.ports["prefect"]),
            PREFECT_API_DATABASE_CONNECTION_URL=url,
        )  # fmt: skip
        _wait_for(self.ports["s3"])
        import boto3

        boto3.client(
            "s3", endpoint_url=self.s3, aws_access_key_id="test", aws_secret_access_key="test",
            region_name="us-east-1",
        ).create_bucket(Bucket=BUCKET)  # fmt: skip
        _wait_for(self.ports["prefect"], f"{self.env['PREFECT_API_URL']}/health")

    @property
    def s3(self) -> str:
        return f"http://127.0.0.1:{self.ports['s3']}"

    def make_project(self, inputs: Path) -> None:
        """Make a project of few stages, not run, with its remotes: `origin` in git, S3 in DVC."""
        project.make(self.person, inputs)
        project.write(self.person, params(inputs))
        for name in ("prefect.yaml", "deploy"):
            source = project.ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, self.person / name)
        project.run(self.person, "dvc", "remote", "add", "-d", "--force", "s3", f"s3://{BUCKET}/store")
        project.run(self.person, "dvc", "remote", "modify", "s3", "endpointurl", self.s3)
        project.commit(self.person, "remotes")
        project.run(self.folder, "git", "clone", "-q", "--bare", str(self.person), str(self.origin))
        project.run(self.person, "git", "remote", "add", "origin", str(self.origin))
        self.hook.mkdir()
        (self.hook / "sitecustomize.py").write_text(HOOK)

    def clone(self, name: str) -> Path:
        """A clone for runs."""
        project.run(self.folder, "git", "clone", "-q", str(self.origin), name)
        return self.folder / name

    def worker(self, name: str, pool: str) -> subprocess.Popen[bytes]:
        """Start a worker with a clone of its own."""
        clone = self.folder / name
        if not clone.exists():
            self.clone(name)
        return self.start(
            "prefect", "worker", "start", "--pool", pool, "--name", name, "--limit", "1",
            PRUNEQUANT_CLONE=str(clone), PYTHONPATH=f"{self.hook}{os.pathsep}{clone}",
            PREFECT_HOME=str(self.folder / f"{name}-prefect"),
        )  # fmt: skip

    def start(self, *command: str, **variables: str) -> subprocess.Popen[bytes]:
        """Start a process that ends with the test; its output is in a file of its name."""
        log = (self.folder / f"{len(self.processes)}.log").open("wb")
        process = subprocess.Popen(
            command, cwd=self.folder, env={**self.env, **variables}, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        log.close()
        self.processes.append(process)
        return process

    def run(self, *command: str, code: int | None = 0, **variables: str) -> str:
        """Run a command in the person's folder; return what it printed; None is any exit code."""
        done = subprocess.run(
            command, cwd=self.person, env={**self.env, "PYTHONPATH": str(self.person), **variables},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert code in (None, done.returncode), done.stdout
        return done.stdout

    def computed(self) -> list[list[str]]:
        """Every stage that was computed so far: its clone, module and recipe."""
        log = self.hook / "log"
        return [line.split() for line in log.read_text().splitlines()] if log.exists() else []

    def stop(self) -> None:
        """End everything, the server last."""
        for process in reversed(self.processes):
            end_tree(process, signal.SIGKILL)
        shutil.rmtree(self.database)


def end_tree(process: subprocess.Popen[bytes], number: int) -> None:
    """Signal a process and all it started, as if its machine went down."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        tree = [parent, *parent.children(recursive=True)]
        for each in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(number)
    process.wait(30)


@contextlib.contextmanager
def running(folder: Path, inputs: Path) -> Iterator[Runners]:
    """Yield servers and a project with its pools, deployments and automations."""
    runners = Runners(folder)
    try:
        runners.start_servers()
        runners.make_project(inputs)
        for pool in ("runs", "cpu", "gpu", "exclusive"):
            runners.run("prefect", "work-pool", "create", pool, "--type", "process")
        runners.run("prefect", "deploy", "--all")
        runners.run("prefect", "automation", "create", "--from-file", "deploy/automations.yaml")
        yield runners
    finally:
        runners.stop()


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def _exists(user: str) -> bool:
    with contextlib.suppress(KeyError):
        return bool(pwd.getpwnam(user))
    return False


def _wait_for(port: int, url: str | None = None, seconds: float = 120) -> None:
    """Wait until something listens on the port, or the address answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if url is None:
                socket.create_connection(("127.0.0.1", port), 1).close()
            else:
                urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nothing answers on port {port}"
            time.sleep(0.3)
