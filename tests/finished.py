"""A small sweep run once a session by `dvc repro`, and copies of it to change and run again."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests import project

CANDIDATES = ["base/tiny", "noise/tiny-batch-3", "quantize/gptq-w4g32"]
STAGES = {
    "code", "validate", "model@tiny", "dataset@news", "dataset@arithmetic", "prune@magnitude-50",
    "prune@wanda-50", "quantize@gptq-w4g32", "finetune@wanda-50-lora", "noise@tiny-batch-3", "report", "tidy",
    *(f"perplexity@{candidate}-news" for candidate in CANDIDATES),
    *(f"graded@{candidate}-arithmetic" for candidate in CANDIDATES),
}  # fmt: skip


def params(inputs: Path) -> dict[str, Any]:
    """One recipe a stage, a second pruned model nothing builds upon, three candidates on two suites."""
    values = project.params(inputs)
    del values["datasets"]["speeches"], values["quantize"]["rtn-w4g32"]
    gptq = values["quantize"].pop("wanda-50-gptq-w4g32")
    values["quantize"]["gptq-w4g32"] = gptq
    values["evaluate"]["candidates"] = CANDIDATES
    copied: dict[str, Any] = json.loads(json.dumps(values))  # no part shared, so that each can be edited
    return copied


def make(folder: Path, inputs: Path) -> Path:
    """The project before anything is run, with a remote beside it, committed."""
    project.make(folder, inputs)
    project.write(folder, params(inputs))
    project.run(folder, "dvc", "remote", "add", "-d", "local", str(folder.parent / f"{folder.name}-remote"))
    project.commit(folder, "a small sweep")
    return folder


def copy(source: Path, folder: Path) -> Path:
    """A copy with its outputs and cache."""
    return Path(shutil.copytree(source, folder, symlinks=True))


def environment(folder: Path) -> dict[str, str]:
    """As `project.run`, with Prefect's database in the project's parent."""
    home = folder.parent / "prefect"
    return {**project.ENV, **project.importing(folder), "PREFECT_HOME": str(home)}


def prunequant(folder: Path, *arguments: str, code: int = 0) -> str:
    """Run the command line in the project and return what it printed; assert its exit code."""
    done = subprocess.run(
        ["prunequant", *arguments],
        cwd=folder, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


def outcomes(folder: Path) -> dict[str, str]:
    """How each stage of the last flow ended."""
    return {row["stage"]: row["state"] for row in json.loads((folder / "data/runs/flow.json").read_text())}


def edit(folder: Path, key: str, value: Any) -> None:
    """Set one dotted key of params.yaml."""
    values = project.read(folder)
    at = values
    *parents, last = key.split(".")
    for parent in parents:
        at = at[parent]
    at[last] = value
    project.write(folder, values)


def repro(folder: Path, *targets: str) -> set[str]:
    """`dvc repro`; the stages whose command ran."""
    done = project.run(folder, "dvc", "repro", *targets)
    started = [line for line in done.stdout.splitlines() if line.startswith("Running stage '")]
    return {line.split("'")[1] for line in started}


def status(folder: Path) -> set[str]:
    """The stages DVC calls stale by themselves."""
    return set(json.loads(project.run(folder, "dvc", "status", "--json").stdout))


def processes(mark: str) -> list[str]:
    """Command lines of the living processes that carry `mark` in their environment."""
    commands = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    commands.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return commands
