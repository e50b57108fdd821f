"""A DVC project of do-nothing stages, without git: `code`, and `a` and `b` that depend on it."""

import os
import subprocess
import sys
from pathlib import Path

from dvc.repo import Repo  # here, as DVC logs to the standard output of the moment it is imported

from flows.graph import Graph, Stage
from tests import project

YAML = """stages:
  code:
    cmd: mkdir -p data/code && cp stages/x data/code/x
    deps: [stages]
    outs: [data/code]
  a:
    cmd: cp data/code/x a.txt
    deps: [data/code]
    outs: [a.txt]
  b:
    cmd: cp data/code/x b.txt
    deps: [data/code]
    outs: [b.txt]
"""
GRAPH: Graph = {
    "code": Stage("code", "true", (), ("data/code",)),
    "a": Stage("a", "true", ("code",), ("a.txt",)),
    "b": Stage("b", "true", ("code",), ("b.txt",)),
}


def make(folder: Path) -> None:
    """Make the project; nothing has run."""
    Repo.init(str(folder), no_scm=True).close()
    (folder / "dvc.yaml").write_text(YAML)
    (folder / "stages").mkdir()
    (folder / "stages/x").write_text("x\n")


def dvc(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run DVC here."""
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, env=project.ENV, capture_output=True, text=True)


def sleeper(*words: str, **variables: str) -> subprocess.Popen[bytes]:
    """A process that sleeps, with these words on its command line."""
    command = [sys.executable, "-c", "import time; time.sleep(60)", *words]
    return subprocess.Popen(command, env={**os.environ, **variables})
