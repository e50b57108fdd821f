"""What the doctor says of a sound project and of broken ones."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows import doctor
from flows.cli import app
from tests import finished as sweep
from tests import project


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Path:
    """A project in which nothing has run yet; copy it, do not write to it."""
    return sweep.make(tmp_path_factory.mktemp("doctor") / "project", inputs)


@pytest.fixture
def folder(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = sweep.copy(sound, tmp_path / "project")
    monkeypatch.chdir(copy)
    project.run(copy, "git", "config", "user.name", "t")
    project.run(copy, "git", "config", "user.email", "t@t")
    return copy


def findings() -> dict[str, tuple[str, str]]:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    rows = json.loads(result.stdout)
    assert result.exit_code == any(row["state"] == "problem" for row in rows)
    return {row["subject"]: (row["state"], row["text"]) for row in rows}


def test_a_sound_project_has_no_problem(folder):
    seen = findings()
    assert {subject for subject, (state, _) in seen.items() if state == "problem"} == set()
    assert set(seen) >= {
        "git", "dvc cache", "dvc remote", "params.yaml", "dvc.lock", "disk", "versions", "processor",
        "prefect", "leftovers", "device", "threads", "memory", "cards",
    }  # fmt: skip
    assert seen["data/code"][0] == "warning"  # nothing has run


def cut_lock() -> None:
    Path("dvc.lock").write_text("schema: '2.0'\nstages:\n  a: {cmd: 'x")


def bad_params() -> None:
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("sparsity: 0.5", "sparsity: 1.5"))


def leave_scratch() -> None:
    Path("data/scratch/resume").mkdir(parents=True)
    Path("data/scratch/resume/block").write_text("x")


def other_versions() -> None:
    Path("requirements.lock").write_text("torch==0.1\nno-such-package==1.0\n")


def many_threads() -> None:
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("threads: 1\n", "threads: 1000\n", 1))


@pytest.mark.parametrize(
    ("spoil", "subject", "state", "text"),
    [
        (cut_lock, "dvc.lock", "problem", "`git checkout dvc.lock` takes"),
        (bad_params, "params.yaml", "problem", "sparsity: 1.5 given"),
        (leave_scratch, "leftovers", "warning", "1 files in data/scratch"),
        (other_versions, "versions", "warning", "torch .* instead of 0.1, no-such-package none instead of"),
        (many_threads, "device", "warning", "run.threads is 1000, but"),
    ],
)  # fmt: skip
def test_what_is_broken_is_named_with_its_cure(spoil, subject, state, text, folder):
    spoil()
    seen = findings()[subject]
    assert seen[0] == state and re.search(text, seen[1]), seen


def test_outside_a_project_it_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", os.fspath(tmp_path.parent))
    seen = findings()
    assert seen["git"] == ("problem", "this folder is not in a git repository; clone the project")
    assert seen["dvc"][0] == "problem" and seen["params.yaml"][0] == "problem"


def test_a_server_that_does_not_answer_is_a_problem(folder):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert findings()["prefect"][0] == "problem"


def test_a_check_that_fails_does_not_take_down_the_others(monkeypatch):
    def broken() -> Iterator[doctor.Finding]:
        raise RuntimeError("no such thing")
        yield

    monkeypatch.setattr(doctor, "CHECKS", (broken, lambda: iter([doctor.Finding("disk", "ok", "")])))
    first, second = doctor.examine()
    assert first == ("broken", "problem", "RuntimeError: no such thing") and second.subject == "disk"
