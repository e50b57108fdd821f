"""Where everything under `data/` lies, and writes that happen whole or not at all.

A killed stage leaves nothing half written: a file or folder is written beside its target or in
`data/scratch/`, and moved into place at the end. DVC deletes a stage's outputs before it runs, so whatever
must survive a kill belongs in scratch as well.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DATA = Path("data")
MODELS = DATA / "models"
"""Model artifacts: `<stage>/<recipe>`, a folder each."""
DATASETS = DATA / "datasets"
"""Data sets, downloaded and taught: `<name>`, a folder each."""
RESULTS = DATA / "results"
"""Evaluations: `<candidate>/<suite>`, a folder each."""
PROFILES = DATA / "profile"
"""Speed, memory and energy: `<candidate>`, a folder each."""
CURVES = DATA / "curves"
"""Learning curves: `<recipe>.csv`."""
REPORT = DATA / "report"
CODE = DATA / "code"
"""Code identities: `<stage>/<method>`, see `stages.core.identity`."""
VALIDATED = DATA / "validated.json"
"""The constant mark that params.yaml was checked, on which every stage but `code` depends."""
RUNS = DATA / "runs"
"""Run records and logs, which vary from run to run: `<stage>/<recipe>.json`."""
SCRATCH = DATA / "scratch"
"""Unfinished work of killed stages."""

RECORD = "artifact.json"
"""What is known of a model artifact, in its folder."""
DATASET = "dataset.json"
"""What is known of a data set, in its folder."""


def run_record(stage: str, name: str) -> Path:
    """Return the path of the record of a stage's last run for the recipe `name`."""
    return RUNS / stage / f"{name}.json"


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """Yield a scratch folder that replaces `target` when the body ends, and is deleted when it raises."""
    partial = SCRATCH / "partial" / "__".join(target.parts)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _share(partial)
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _share(folder: Path) -> None:
    """Give files the permissions of any new file; some writers make theirs private."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a path beside `file` that replaces it when the body ends, and is deleted when it raises."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(file: Path, value: Any) -> None:
    """Write JSON, whole or not at all, keys in the order given."""
    write_text(file, json.dumps(value, indent=2) + "\n")


def read_json(file: Path) -> Any:
    """Parse a JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def sha256(path: Path) -> str:
    """Hash a file, or a folder as its sorted lines `<relative path>` NUL `<sha256>`."""
    if path.is_dir():
        lines = sorted(
            f"{file.relative_to(path).as_posix()}\0{sha256(file)}"
            for file in path.rglob("*")
            if file.is_file()
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
